"""Sweeps as jobs of submitit and tasks of Ray."""

import fcntl
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pandas as pd
import pytest

from mixerlab.__main__ import main
from mixerlab.lm.sweep import cluster
from mixerlab.lm.sweep.cluster import launcher, work
from mixerlab.lm.sweep.folder import Sweep
from mixerlab.options import ConfigError
from sweeps import begun, ended_with, fail, finish, recipe_file, start, wait_until


class Pretended:
    """A training that needs no process and is over when it is looked at."""

    code = 0

    def __init__(self, sweep, label, environment):
        self.place = os.getcwd()
        if self.code:
            fail(sweep, label, code=self.code)
        else:
            finish(sweep, label, valid__loss=1.0)

    def poll(self):
        return self.code


@pytest.fixture
def at_home(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # and back again, whatever a job changes
    monkeypatch.setattr(cluster, "Training", Pretended)
    monkeypatch.setattr(cluster, "POLL", 0.01)
    return tmp_path


def test_a_job_trains_its_point_and_no_other(at_home):
    sweep = begun(at_home, "seed=0,1")
    assert work(str(sweep.path), "seed=1", str(at_home)) == 0
    assert [sweep.status(label).state for label in sweep.points] == ["waiting", "finished"]


def test_a_job_has_nothing_to_do_where_another_has_finished(at_home, monkeypatch):
    sweep = begun(at_home, "seed=0,1")
    finish(sweep, "seed=0")
    monkeypatch.setattr(cluster, "Training", None)
    assert work(str(sweep.path), "seed=0", str(at_home)) == 0


def test_a_job_waits_for_another_that_trains_its_point(at_home):
    sweep = begun(at_home, "seed=0,1")
    codes = []
    with sweep.log_file("seed=0").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        job = threading.Thread(target=lambda: codes.append(work(str(sweep.path), "seed=0", str(at_home))))
        job.start()
        time.sleep(0.2)
        assert sweep.run_of("seed=0") is None
    job.join(timeout=60)
    assert (codes, sweep.status("seed=0").state) == ([0], "finished")


def test_a_job_ends_with_the_code_of_its_training(at_home, monkeypatch):
    sweep = begun(at_home, "seed=0,1")
    monkeypatch.setattr(Pretended, "code", 2)
    assert work(str(sweep.path), "seed=0", str(at_home)) == 2


def test_a_job_starts_the_processes_of_its_run_itself(at_home, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    sweep = begun(at_home, "seed=0,1")
    work(str(sweep.path), "seed=0", str(at_home))
    assert "SLURM_NTASKS" not in os.environ


@pytest.mark.parametrize("name", ["submitit", "ray"])
def test_a_launcher_that_is_not_installed_is_named(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=rf"--launcher {name}: .*pip install 'mixerlab\[{name}\]'"
    ) as raised:
        launcher(name, begun(tmp_path, "seed=0,1"), [])
    assert "\n" not in str(raised.value)


def test_options_are_handed_to_the_launcher_and_a_wrong_one_is_named(tmp_path, monkeypatch):
    given = {}

    class AutoExecutor:
        def __init__(self, folder, cluster):
            given["cluster"] = cluster

        def update_parameters(self, **parameters):
            if "partition" in parameters:
                raise NameError("unknown argument partition")
            given.update(parameters)

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=AutoExecutor))
    sweep = begun(tmp_path, "seed=0,1")
    launcher("submitit", sweep, ["slurm_partition=gpu", "gpus_per_node=2", "cluster=local"])
    assert given == {
        **{"cluster": "local", "timeout_min": 1440, "name": "compare-sweep"},
        **{"slurm_partition": "gpu", "gpus_per_node": 2},
    }
    with pytest.raises(ConfigError, match="--option: unknown argument partition"):
        launcher("submitit", sweep, ["partition=gpu"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--option", "num_cpus=2"], "--option is for --launcher submitit or ray"),
        (["--launcher", "ray", "--jobs", "2"], "--jobs is for this machine"),
    ],
)
def test_options_of_another_launcher_are_refused(tmp_path, capsys, arguments, said):
    with pytest.raises(SystemExit) as left:
        main(["sweep", recipe_file(tmp_path), "seed=0,1", *arguments])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_tasks_of_ray_end_with_checkpoints(tmp_path):
    source, long = recipe_file(tmp_path), ["trainer.steps=100000", "trainer.val_every=100000"]
    process = start(source, tmp_path / "runs", *long, how=("--launcher", "ray"))
    folder = tmp_path / "runs" / "compare-sweep"
    wait_until(lambda: any(sum(1 for _ in path.open()) > 20 for path in folder.glob("2*/metrics.csv")))
    process.send_signal(signal.SIGINT)
    _, err = ended_with(process, 130)
    assert "stopped: SIGINT; the same command goes on" in err
    sweep = Sweep.open(folder)
    assert any(sweep.run_of(label) for label in sweep.points)
    assert {sweep.status(label).state for label in sweep.points} <= {"interrupted", "waiting"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options"), [("submitit", ["--option", "cluster=local"]), ("ray", [])])
def test_the_table_is_that_of_this_machine(tmp_path, name, options, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tables = []
    for how in (["--jobs", str(len(os.sched_getaffinity(0)))], ["--launcher", name, *options]):
        folder = tmp_path / how[1]
        given = ["model.mixer=attention,mamba2", "seed=0,1", f"logging.dir={folder}"]
        assert main(["sweep", recipe_file(tmp_path), *given, *how]) == 0
        path = Sweep.open(folder / "compare-sweep").path
        tables.append(pd.read_csv(path / "report" / "table.csv").drop(columns="tokens_per_second"))
    assert tables[0].equals(tables[1])
