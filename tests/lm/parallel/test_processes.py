"""The processes of a run: started by whomever, agreeing, and ended together."""

import pickle
import socket

import pytest
import torch

from mixerlab.lm.parallel.processes import (
    LostProcessError,
    World,
    device_kind,
    local_devices,
)
from mixerlab.lm.parallel.processes import start as start_world
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError
from started_runs import DDP, FSDP, LONG, assert_same_curves, finish, layout, plugin, start
from tiny_runs import run_dirs

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


@pytest.mark.slow
def test_slurm_starts_it_on_two_nodes(tmp_path, unequal):
    job = {"SLURM_JOB_ID": "12345", "SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NODELIST": "127.0.0.1"}
    job |= {"SLURM_JOB_NAME": "train", "SLURM_NTASKS_PER_NODE": "1", "SLURM_LOCALID": "0"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        start(
            *unequal,
            *DDP,
            "trainer.batch_size=2",
            "trainer.steps=3",
            env=job | {"SLURM_PROCID": str(n), "SLURM_NODEID": str(n)},
        )
        for n in range(2)
    ]
    for rank in ranks:
        finish(rank)
    finish(start(*unequal, *layout(1, 4), "trainer.steps=3"))
    two, one = run_dirs(tmp_path)
    assert_same_curves(two, one)


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named(tmp_path, unequal):
    mishap = plugin(tmp_path, DIES)
    more = ["plugins=[mishap]", "trainer.checkpoint_every=2", "trainer.num_workers=1"]
    process = start(*unequal, *LONG, *layout(2, 2), *more, **mishap)
    _, err = finish(process, code=1)
    assert "rank 1 was killed by signal 9" in err
    (run,) = run_dirs(tmp_path)
    assert read_meta(Run(run).checkpoints.last())["global_step"] == 4


class Store(dict):
    """As much of torch's store as a World needs."""

    def set(self, key, value):
        self[key] = value

    def wait(self, keys, timeout):
        assert set(keys) <= set(self)


def two_ranks():
    store = Store()
    return [World(rank, rank, devices=2, store=store) for rank in range(2)]


def test_every_rank_gets_the_answer_of_the_main_process():
    main, other = two_ranks()
    for answer in (3, {"a": [1]}, None):
        assert main.ask_main(lambda answer=answer: answer) == answer
        assert other.ask_main(lambda: pytest.fail("only the main process is asked")) == answer


def test_every_rank_raises_what_the_main_process_does():
    main, other = two_ranks()

    def wrong():
        raise ConfigError("seed = -1")

    for world in (main, other):
        assert not world.all_raised
        with pytest.raises(ConfigError, match="seed = -1"):
            world.ask_main(wrong)
        assert world.all_raised, "so that it is said once"


def test_an_error_that_cannot_travel_arrives_as_its_text():
    main, other = two_ranks()

    class Local(Exception):
        """Cannot be pickled: nobody can import it."""

    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(Local())

    def wrong():
        raise Local("details")

    with pytest.raises(Local):
        main.ask_main(wrong)
    with pytest.raises(LostProcessError, match=r"rank 0 failed: Local\('details'\)"):
        other.ask_main(wrong)


def test_a_single_process_asks_itself():
    world = World()
    assert world.ask_main(lambda: 3) == 3
    assert world.gather("a") == ["a"]
    assert world.max(1, 2) == [1, 2]
    assert world.sum(torch.tensor(5)) == 5
    world.wait_for_all()


def test_one_device_starts_no_process(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    world = start_world(StrategyConfig(accelerator="cpu"), ["never", "started"])
    assert (world.size, world.rank, world.environment) == (1, 0, None)


def test_several_machines_need_a_starter():
    with pytest.raises(ConfigError, match=r"strategy\.num_nodes = 2: on several machines torchrun or SLURM"):
        start_world(StrategyConfig(num_nodes=2), [])


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
