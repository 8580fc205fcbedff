"""Several processes: as one would train, and from any number of ranks to any other."""

import csv
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
from mixerlab.lm.run.checkpoint import CheckpointError, find_damage, read, read_meta
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
    sizes = [size for size, _ in read_meta(Run(two).checkpoints.last())["files"].values()]
    assert len(sizes) == 2, "each writes a part"
    assert max(sizes) < 0.7 * sum(sizes)
    saved = [read(Run(run).checkpoints.last())["state_dict"] for run in (one, two)]
    assert list(saved[0]) == list(saved[1])
    for name, value in saved[0].items():
        torch.testing.assert_close(saved[1][name], value, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_what_the_mixers_do_is_reported_as_under_one_process(tmp_path, unequal, strategy):
    few = ["trainer.steps=2", "trainer.val_every=1"]
    finish(start(*unequal, *few, *layout(1, 2, accumulate=2)))
    finish(start(*unequal, *few, *strategy, *layout(2, 2)))
    one, two = (metrics_of(run, "valid_mixers/") for run in run_dirs(tmp_path))
    assert len(one) == 2 * 2 * 2 * 2, "two validations, layers, quantities, of which mean and spread"
    assert two == pytest.approx(one, abs=1e-5)


def metrics_of(run, prefix):
    """(step, metric) -> value"""
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"].startswith(prefix)]
    return {(row["step"], row["metric"]): float(row["value"]) for row in rows}


@pytest.mark.slow
def test_replicated_shards_train_as_one_process_does(tmp_path, unequal):
    finish(start(*unequal, *layout(1, 4)))
    mixed = ["strategy={name: fsdp, replicate: 2, activation_checkpointing: selective, compile: false}"]
    finish(start(*unequal, *mixed, *layout(4, 1)))
    one, four = run_dirs(tmp_path)
    assert_same_curves(four, one)
    files = read_meta(Run(four).checkpoints.last())["files"]
    assert len(files) == 4, "of each shard the two that hold it write a half"
    assert max(size for size, _ in files.values()) < 0.5 * sum(size for size, _ in files.values())
    before = read(Run(four).checkpoints.last())["state_dict"]
    after = read(Run(one).checkpoints.last())["state_dict"]
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-4)
    # On as many ranks in other groups, and in one.
    for strategy, ranks in (["strategy=fsdp"], 2), (["strategy=auto"], 1):
        longer = [f"trainer.steps={20 + 2 // ranks}", f"resume={four}"]
        finish(start(*unequal, *strategy, *layout(ranks, 4 // ranks), *longer))
    assert sorted(metric(four, "train/loss")) == list(range(1, 23))


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
@pytest.mark.parametrize("strategy", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_a_damaged_file_that_one_rank_finds_leads_all_to_the_checkpoint_before(tmp_path, unequal, strategy):
    few = [*unequal, *strategy, *layout(2, 2), "trainer.steps=6", "trainer.checkpoint_every=4"]
    finish(start(*few))
    (run,) = run_dirs(tmp_path)
    losses = metric(run, "train/loss")
    (run / "result.json").unlink()
    shard = Run(run).checkpoints.at(6) / "shard-1-of-2.ckpt"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    out, err = finish(start(*few, "resume=auto"))
    said = "is damaged: the checksum of shard-1-of-2.ckpt is wrong; using the one before"
    assert " ".join(out.split()).count(said) == 1, err
    assert f"continuing {run} after step 4" in out
    assert metric(run, "train/loss") == losses
    for folder in Run(run).checkpoints.all():
        shard = folder / "shard-1-of-2.ckpt"
        shard.write_bytes(shard.read_bytes()[:-1])
    (run / "result.json").unlink()
    _, err = finish(start(*few, "resume=auto"), code=2)
    assert err.count("the run has no other that is whole, so start a new one") == 1


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
    assert isinstance(strategy, CheckpointFolders)


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


class Trained(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Linear(3, 2)


@pytest.fixture
def one():
    """The strategy of one process with a module and its optimiser, which has done a step."""
    strategy = lightning_strategy(StrategyConfig(), World(), torch.device("cpu"))
    module = Trained()
    strategy.connect(module)
    strategy._lightning_module = module
    optimizer = torch.optim.AdamW(module.parameters())
    strategy.optimizers = [optimizer]
    module.decoder(torch.ones(3)).sum().backward()
    optimizer.step()
    return strategy


def state_of(strategy, step=3):
    return {
        "global_step": step,
        "epoch": 0,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": strategy.lightning_module_state_dict(),
        "optimizer_states": [strategy.optimizer_state(strategy.optimizers[0])],
        "lr_schedulers": [],
    }


def load(strategy, folder):
    """As Lightning does."""
    saved = strategy.load_checkpoint(folder)
    strategy.load_model_state_dict(saved)
    strategy.load_optimizer_state_dict(saved)


def test_lightning_writes_and_reads_the_folders_of_this_package(tmp_path, one):
    folder = tmp_path / "step-00000003"
    one.save_checkpoint(state_of(one), folder)
    assert find_damage(folder) is None
    weight = one.lightning_module.decoder.weight
    moments = one.optimizers[0].state[weight]
    before, average = weight.detach().clone(), moments["exp_avg"].clone()
    torch.nn.init.zeros_(weight)
    moments["exp_avg"].zero_()
    load(one, folder)
    assert torch.equal(weight, before)
    assert torch.equal(one.optimizers[0].state[weight]["exp_avg"], average)


def without(tree, *path):
    *before, last = path
    for key in before:
        tree = tree[key]
    del tree[last]


def with_value(value):
    def put(tree, *path):
        *before, last = path
        for key in before:
            tree = tree[key]
        tree[last] = value

    return put


MOMENT = ("optimizer_states", 0, "state", 0)
GROUP = ("optimizer_states", 0, "param_groups", 0)


@pytest.mark.parametrize(
    ("change", "path", "said"),
    [
        (without, ["epoch"], "it has no epoch"),
        (without, ["optimizer_states"], "it has no optimizer_states"),
        (with_value({}), ["optimizer_states"], "optimizer_states = {}"),
        (with_value(3), ["lr_schedulers"], "lr_schedulers = 3"),
        (without, ["state_dict", "decoder.bias"], 'Missing key(s) in state_dict: "decoder.bias"'),
        (with_value(torch.zeros(3)), ["state_dict", "x.y"], 'Unexpected key(s) in state_dict: "x.y"'),
        (with_value(torch.zeros(7)), ["state_dict", "decoder.bias"], "size mismatch for decoder.bias"),
        (with_value(3), ["optimizer_states", 0], "'int' object"),
        (without, ["optimizer_states", 0, "state"], "no 'state'"),
        (without, [*MOMENT, "exp_avg"], "no 'exp_avg'"),
        (with_value(torch.zeros(7)), [*MOMENT, "exp_avg"], "exp_avg has the shape [7]; expected [2, 3]"),
        (with_value(3), [*MOMENT, "step"], "'int' object"),
        (with_value({}), ["optimizer_states", 0, "state", 9], "list index out of range"),
        (without, [*GROUP, "betas"], "no betas in the optimiser's param_groups"),
        (without, [*GROUP, "params"], "no 'params'"),
        (with_value([0]), [*GROUP, "params"], "doesn't match the size"),
        (without, GROUP, "argument 2 is longer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_line(tmp_path, one, change, path, said):
    folder, state = tmp_path / "step-00000003", state_of(one)
    state["state_dict"] = dict(state["state_dict"])
    change(state, *path)
    one.save_checkpoint(state, folder)
    with pytest.raises(CheckpointError) as caught:
        load(one, folder)
    assert str(caught.value).startswith(f"checkpoint {folder} does not fit this run: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert one.world.all_raised
