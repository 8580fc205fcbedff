"""Several processes: as one would train, and from any number of ranks to any other."""

import json
import shutil

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from mixerlab.__main__ import main
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.strategies import CheckpointFolders, lightning_strategy, synchronise_gradients
from mixerlab.lm.recipe.schema import StrategyConfig
from mixerlab.lm.run.checkpoint import find_damage, read, read_meta
from mixerlab.lm.run.folder import Run
from started_runs import DDP, FSDP, assert_same_curves, finish, layout, sharded, start
from tiny_runs import generate, metric, run_dirs


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [DDP, FSDP, ["strategy={name: fsdp, reduce_every: micro_batch}"]],
    ids=["ddp", "fsdp", "fsdp, gradients in shards"],
)
def test_two_processes_train_as_one_does(tmp_path, unequal, strategy):
    finish(start(*unequal, *layout(1, 4)))
    finish(start(*unequal, *strategy, *layout(2, 1, accumulate=2)))
    one, two = run_dirs(tmp_path)
    assert sorted(metric(two, "train/loss")) == list(range(1, 21))
    assert_same_curves(two, one)
    names = list(read_meta(Run(two).checkpoints.last())["files"])
    expected = ["state.ckpt"] if strategy == DDP else ["shard-0-of-2.ckpt", "shard-1-of-2.ckpt"]
    assert names == expected


@pytest.mark.slow
def test_replicated_shards_train_as_one_process_does(tmp_path, unequal):
    finish(start(*unequal, *layout(1, 4)))
    mixed = ["strategy={name: fsdp, replicate: 2, activation_checkpointing: selective, compile: false}"]
    finish(start(*unequal, *mixed, *layout(4, 1)))
    one, four = run_dirs(tmp_path)
    assert_same_curves(four, one)
    assert len(read_meta(Run(four).checkpoints.last())["files"]) == 2, "one of the two copies is written"


@pytest.mark.slow
def test_shards_gathered_and_reduced_in_bf16_learn(tmp_path, unequal):
    low = [
        "strategy={name: fsdp, param_dtype: bfloat16, reduce_dtype: bfloat16}",
        "trainer.precision=bf16-mixed",
    ]
    finish(start(*unequal, *layout(1, 4)))
    finish(start(*unequal, *low, *layout(2, 2)))
    one, two = (metric(run, "train/loss")[20] for run in run_dirs(tmp_path))
    assert two == pytest.approx(one, abs=0.15)
    weights = read(Run(run_dirs(tmp_path)[1]).checkpoints.last())["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}, (
        "the weights themselves are float32"
    )


@pytest.mark.slow
def test_what_two_ranks_save_one_and_three_load(tmp_path, unequal):
    both = [*unequal, *FSDP, "trainer.steps=12", "trainer.val_every=12", "trainer.checkpoint_every=8"]
    finish(start(*both, *layout(2, 3)))
    (whole,) = run_dirs(tmp_path)
    step8 = Run(whole).checkpoints.named("8")
    saved = read(step8)["state_dict"]

    for ranks, batch_size in ((1, 6), (3, 2)):
        found = sharded(tmp_path, *FSDP, f"strategy.devices={ranks}", f"resume={step8}")["whole"]
        for name, value in found.items():
            assert torch.equal(value, saved[f"decoder.{name}"]), name
        cut = tmp_path / "runs" / "tiny" / f"cut-{ranks}"
        shutil.copytree(whole, cut)
        (cut / "result.json").unlink()
        shutil.rmtree(cut / "checkpoints" / "step-00000012")
        finish(start(*both, *layout(ranks, batch_size), f"resume={cut}"))
        assert_same_curves(cut, whole)


@pytest.mark.slow
def test_every_tool_reads_shards_and_the_run_goes_on_in_one_process(tmp_path, unequal, capsys):
    finish(start(*unequal, *FSDP, *layout(2, 2), "trainer.checkpoint_every=5", "trainer.steps=13"))
    (run,) = run_dirs(tmp_path)
    final = json.loads((run / "result.json").read_text())
    capsys.readouterr()
    assert generate(run, "--prompt", "a", "--max-new-tokens", "5") == 0
    text = capsys.readouterr().out
    assert main(["validate", str(run)]) == 0
    assert f"{final['valid/loss']:.4f}" in capsys.readouterr().out
    assert main(["checkpoints", str(run), "--to", "one-file"]) == 0
    assert list(read_meta(Run(run).checkpoints.last())["files"]) == ["state.ckpt"]
    capsys.readouterr()
    assert generate(run, "--prompt", "a", "--max-new-tokens", "5") == 0
    assert capsys.readouterr().out == text
    finish(start(*unequal, *layout(1, 4), "trainer.steps=20", f"resume={run}"))  # one file, one process
    assert main(["checkpoints", str(run), "--to", "sharded", "--shards", "3"]) == 0
    # Three shards, two ranks.
    finish(start(*unequal, *FSDP, *layout(2, 2), "trainer.steps=22", f"resume={run}"))
    assert sorted(metric(run, "train/loss")) == list(range(1, 23))


@pytest.mark.slow
def test_a_run_of_several_ranks_gives_its_decoder_to_one_process(tmp_path, unequal):
    finish(start(*unequal, *FSDP, *layout(2, 2), "trainer.steps=2"))
    (run,) = run_dirs(tmp_path)
    assert Run(run).recipe.strategy.name == "fsdp"
    assert all(torch.isfinite(p).all() for p in Run.open(run).decoder().parameters())


class Wrapped(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(2, 2)


COUNT = """
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as shards
from mixerlab.lm.training.module import LanguageModel

step, reduce, calls = LanguageModel.training_step, shards.foreach_reduce, []

def counted(*args, **kwargs):
    calls.append(1)
    return reduce(*args, **kwargs)

def reported(self, micro_batches, i):
    calls.clear()
    step(self, micro_batches, i)
    if self.world.rank == 0:
        print(f"{len(micro_batches)} micro-batches, {len(calls)} sums", flush=True)

shards.foreach_reduce, LanguageModel.training_step = counted, reported
"""


@pytest.mark.slow
@pytest.mark.parametrize(("every", "sums"), [("step", 3), ("micro_batch", 9)])
def test_shards_of_gradients_are_summed_once_a_step_or_as_often_as_asked(tmp_path, unequal, every, sums):
    (tmp_path / "counting.py").write_text(COUNT)
    often = [f"strategy={{name: fsdp, reduce_every: {every}}}", "plugins=[counting]", "trainer.steps=2"]
    process = start(*unequal, *often, *layout(2, 1, accumulate=3), env={"PYTHONPATH": str(tmp_path)})
    out, _ = finish(process)
    # Two blocks, and what is around them.
    assert out.count(f"3 micro-batches, {sums} sums") == 2


def test_one_process_has_gradients_to_bring_together_with_nobody():
    strategy = lightning_strategy(StrategyConfig(), World(), torch.device("cpu"))
    strategy.connect(Wrapped())
    synchronise_gradients(strategy, wanted=False)  # does nothing
    assert isinstance(strategy.checkpoint_io, CheckpointFolders)


def test_ddp_waits_for_the_last_micro_batch():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        strategy = lightning_strategy(StrategyConfig(name="ddp"), World(devices=2), torch.device("cpu"))
        strategy.model = DistributedDataParallel(torch.nn.Linear(2, 2))
        for wanted in (False, True):
            synchronise_gradients(strategy, wanted)
            assert strategy.model.require_backward_grad_sync == wanted
    finally:
        dist.destroy_process_group()


def test_lightning_writes_and_reads_the_folders_of_this_package(tmp_path):
    io, folder = CheckpointFolders(), tmp_path / "step-00000003"
    state = {"global_step": 3, "state_dict": {"a": torch.arange(3)}}
    io.save_checkpoint(state, folder)
    assert find_damage(folder) is None
    assert torch.equal(io.load_checkpoint(folder)["state_dict"]["a"], torch.arange(3))
    io.remove_checkpoint(folder)
    assert not folder.exists()
