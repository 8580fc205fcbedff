"""The processes of a run: started by whomever, agreeing, and ended together."""

import json
import os
import pickle
import signal
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mixerlab.lm.parallel import launch as launch_module
from mixerlab.lm.parallel.launch import _meet, device_kind, launch, local_devices
from mixerlab.lm.parallel.processes import LostProcessError, World
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError, UserError
from started_runs import DDP, FSDP, LONG, assert_same_curves, finish, layout, plugin, start, wait_for_step
from tiny_runs import metric, run_dirs

DIES = """
import os, signal
from mixerlab.lm.training.module import LanguageModel
step = LanguageModel.training_step
def die(self, micro_batches, i):
    if self.world.rank == 1 and self.trainer.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, micro_batches, i)
LanguageModel.training_step = die
"""


@pytest.mark.slow
def test_torchrun_starts_it(tmp_path, unequal):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish(start(*unequal, *FSDP, *layout(2, 2)[1:], "trainer.steps=3", launcher=launcher))
    finish(start(*unequal, *layout(1, 4), "trainer.steps=3"))
    two, one = run_dirs(tmp_path)
    assert_same_curves(two, one)
    _, err = finish(start(*unequal, *layout(3, 2), launcher=launcher), code=1)
    assert "strategy.devices = 3: torchrun started 2 processes" in err


DIES_ONCE = """
import os, signal
from pathlib import Path
from mixerlab.lm.training.module import LanguageModel
step, mark = LanguageModel.training_step, Path(__file__).with_name("died")
def die(self, micro_batches, i):
    if self.world.rank == 1 and self.trainer.global_step == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, micro_batches, i)
LanguageModel.training_step = die
"""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "strategy"), [(1, DDP), (2, DDP), (2, FSDP)])
def test_a_restart_by_torchrun_goes_on_with_its_run(tmp_path, unequal, ranks, strategy):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    mishap = plugin(tmp_path, DIES_ONCE.replace("rank == 1", f"rank == {ranks - 1}"))
    sizes = layout(ranks, 4 // ranks)
    arguments = [*unequal, *strategy, *sizes[1:], "trainer.steps=8", "trainer.checkpoint_every=2"]
    out, _ = finish(
        start(*arguments, "plugins=[mishap]", launcher=[*launcher, "--max-restarts", "1"], **mishap)
    )
    assert "after step 4" in out
    finish(start(*arguments, *sizes))
    whole, restarted = sorted(
        run_dirs(tmp_path), key=lambda run: "plugins" in (run / "recipe.yaml").read_text()
    )
    assert_same_curves(restarted, whole, tolerance=0)
    assert sorted(metric(restarted, "train/loss")) == list(range(1, 9)), "each step is logged once"


@pytest.fixture
def slurm():
    """Environment variables of two tasks on two machines, by rank."""
    job = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    job |= {
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_ID": "0",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    return [job | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)} for n in range(2)]


@pytest.mark.slow
def test_slurm_starts_it_on_two_nodes(tmp_path, unequal, slurm):
    ranks = [start(*unequal, *DDP, "trainer.batch_size=2", "trainer.steps=3", env=env) for env in slurm]
    for rank in ranks:
        finish(rank)
    finish(start(*unequal, *layout(1, 4), "trainer.steps=3"))
    two, one = run_dirs(tmp_path)
    assert_same_curves(two, one)


PREPARES_BADLY = """
import os, signal, time
from mixerlab.data.background import in_background
from mixerlab.data.module import DataError
from mixerlab.data.text import TextData
prepare = TextData.prepare
def badly(self):
    if os.environ["SLURM_PROCID"] == "1":
        {how}
    return prepare(self)
TextData.prepare = badly
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "message"),
    [
        ("raise DataError('data.files: no such file here')", 2, "rank 1: data.files: no such file here"),
        ("1 / 0", 1, "rank 1: ZeroDivisionError('division by zero')"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 1, "the others wait for rank 1 ("),
        ("time.sleep(600)", 1, "the others wait for rank 1 (preparing the data)"),
        (
            "in_background(lambda _: time.sleep(600), lambda: self.report('loading'))",
            1,
            "the others wait for rank 1 (preparing the data)",
        ),
    ],
)
def test_a_machine_that_cannot_prepare_the_data_ends_the_others(tmp_path, unequal, slurm, how, code, message):
    mishap = plugin(tmp_path, PREPARES_BADLY.format(how=how))
    arguments = [*unequal, *DDP, "plugins=[mishap]", "strategy.timeout=5"]
    main, other = (start(*arguments, env=env | mishap["env"]) for env in slurm)
    began = time.monotonic()
    _, err = finish(main, code=code)
    assert message in err
    other.communicate(timeout=30)
    assert other.returncode in (code, -signal.SIGKILL)
    assert time.monotonic() - began < 60


def test_a_job_script_of_several_tasks_needs_srun(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "16")
    monkeypatch.setenv("SLURM_JOB_NAME", "train.sh")
    for name in ("SLURM_STEP_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="16 tasks, and srun has not started this one: put srun"):
        launch(StrategyConfig(accelerator="cpu"), [])


def test_who_this_is_in_some_other_program_does_not_matter(monkeypatch):
    for name in ("SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LOCAL_RANK", "RANK", "NODE_RANK"):
        monkeypatch.setenv(name, "three")
    assert launch(StrategyConfig(accelerator="cpu"), ["never", "started"]).size == 1
    assert "LOCAL_RANK" not in os.environ, "Lightning would read it"


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path, unequal):
    mishap = plugin(tmp_path, DIES)
    more = ["plugins=[mishap]", "trainer.checkpoint_every=2", "trainer.num_workers=1"]
    process = start(*unequal, *LONG, *layout(2, 2), *more, **mishap)
    _, err = finish(process, code=1)
    assert "rank 1 was killed by signal 9" in err
    (run,) = run_dirs(tmp_path)
    assert read_meta(Run(run).checkpoints.last())["global_step"] == 4


def on_all(work, ranks=2):
    """What `work(world)` returns on each rank, or raises."""
    store = dist.HashStore()

    def one(rank):
        try:
            return work(World(rank, rank, devices=ranks, store=store))
        except Exception as error:
            return error

    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(one, range(ranks)))


def test_every_rank_gets_the_answer_of_the_main_process():
    def ask(world):
        question = (lambda: {"a": [1, None]}) if world.rank == 0 else pytest.fail
        return [world.ask_main(question), world.ask_main(question)]

    assert on_all(ask, ranks=3) == [[{"a": [1, None]}] * 2] * 3


def test_every_rank_raises_what_the_main_process_does():
    worlds = []

    def wrong():
        raise ConfigError("seed = -1")

    def ask(world):
        worlds.append(world)
        world.ask_main(wrong)

    main, other = on_all(ask)
    assert isinstance(main, ConfigError)
    assert isinstance(other, UserError)
    assert str(main) == str(other) == "seed = -1"
    assert all(world.all_raised for world in worlds), "so that it is said once"


def test_a_fault_on_the_main_process_arrives_as_its_text():
    main, other = on_all(lambda world: world.ask_main(lambda: 1 / 0))
    assert isinstance(main, ZeroDivisionError)
    assert isinstance(other, LostProcessError)
    assert "rank 0 failed: ZeroDivisionError('division by zero')" in str(other)


def test_every_rank_gets_the_values_of_all_in_every_round_and_channel():
    def gather(world):
        other = world.channel("other")
        rounds = [world.gather([n, world.rank]) for n in range(3)]
        return rounds, other.gather(world.rank), other.gather("x")

    expected = [[[n, rank] for rank in range(3)] for n in range(3)], [0, 1, 2], ["x"] * 3
    assert on_all(gather, ranks=3) == [expected] * 3


def test_what_was_gathered_does_not_pile_up_in_the_store():
    store = dist.HashStore()
    worlds = [World(rank, rank, devices=2, store=store) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(20):
            list(pool.map(lambda world: world.gather("x" * 100), worlds))
    assert store.num_keys() <= 4


def test_ranks_that_wait_hear_of_another_that_has_failed():
    def fail(world):
        if world.rank:
            world.tell_end(2, "data.files: no such file")
            return world.told_end()
        while (end := world.told_end()) is None:
            time.sleep(0.01)
        return end

    assert on_all(fail) == [{"rank": 1, "code": 2, "why": "data.files: no such file"}, None]


def test_an_attempt_does_not_read_what_the_attempt_before_has_said():
    """Torchrun's store outlives the processes that it restarts."""
    store = dist.HashStore()
    for attempt in range(3):

        def meet(rank, attempt=attempt):
            world = World(rank, rank, devices=2)
            if rank == attempt % 2:
                time.sleep(0.2)  # either may be the first to come
            _meet(world, store)
            return world.ask_main(lambda: attempt), world.gather(attempt)

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(meet, range(2))) == [(attempt, [attempt] * 2)] * 2


def test_ranks_that_do_not_come_are_waited_for_only_so_long(monkeypatch):
    monkeypatch.setattr(launch_module, "MEETING", timedelta(seconds=0.2))
    for rank in range(2):
        with pytest.raises(LostProcessError, match=f"rank {rank}: the other processes have not started"):
            _meet(World(rank, rank, devices=2), dist.HashStore())


class Code:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def test_a_stranger_who_writes_into_the_store_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    store = dist.HashStore()
    world = World(1, 1, devices=2, store=store)
    store.set("answer/0", pickle.dumps(Code(mark)))
    store.set("end", pickle.dumps(Code(mark)))
    store.set("answer/1", json.dumps([1, 2]))
    dist.PrefixStore("channel/main", store).set("0/0", pickle.dumps(Code(mark)))
    ask = partial(world.ask_main, pytest.fail)
    for read in (ask, ask, world.told_end, partial(world.gather, 0)):
        with pytest.raises(LostProcessError, match="no process of this run has written"):
            read()
    assert not mark.exists()
    pickle.loads(pickle.dumps(Code(mark)))
    assert mark.exists(), "or else this tests nothing"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_on_one_machine_no_other_address_reaches_a_run(tmp_path, unequal):
    process = start(*unequal, *LONG, *layout(2, 2))
    wait_for_step(process, 1)
    pids = [str(process.pid), *Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    listening = [address for pid in pids for address in listening_addresses(pid)]
    process.send_signal(signal.SIGTERM)
    finish(process, code=75)
    assert listening, "the store at least"
    assert set(listening) == {"127.0.0.1"}


def listening_addresses(pid):
    """Addresses at which a process takes connections."""
    inodes = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                words = [local[i : i + 8] for i in range(0, len(local.split(":")[0]), 8)]
                yield socket.inet_ntop(family, b"".join(bytes.fromhex(word)[::-1] for word in words))


def test_a_single_process_asks_itself():
    world = World()
    assert world.ask_main(lambda: 3) == 3
    assert world.gather("a") == ["a"]
    assert world.channel("other").gather("a") == ["a"]
    assert world.max(1, 2) == [1, 2]
    assert world.sum(torch.tensor(5)) == 5
    world.tell_end(1, "why")
    assert world.told_end() is None
    world.close(failed=False)


def test_one_device_starts_no_process(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    world = launch(StrategyConfig(accelerator="cpu"), ["never", "started"])
    assert (world.size, world.rank, world.environment) == (1, 0, None)


def test_several_machines_need_a_starter():
    with pytest.raises(ConfigError, match=r"strategy\.num_nodes = 2: on several machines torchrun or SLURM"):
        launch(StrategyConfig(num_nodes=2), [])


def test_a_cpu_has_as_many_devices_as_are_asked_for():
    assert local_devices(StrategyConfig(accelerator="cpu")) == 1
    assert local_devices(StrategyConfig(accelerator="cpu", devices=5)) == 5
    assert device_kind(StrategyConfig(accelerator="cpu")) == "cpu"


def test_more_gpus_than_there_are_get_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert local_devices(StrategyConfig()) == 2
    with pytest.raises(ConfigError, match=r"strategy\.devices = 3: this machine has 2 GPUs; expected auto"):
        local_devices(StrategyConfig(devices=3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    assert device_kind(StrategyConfig()) == "cpu"
    with pytest.raises(ConfigError, match=r"strategy\.accelerator = 'gpu': no CUDA device"):
        device_kind(StrategyConfig(accelerator="gpu"))
