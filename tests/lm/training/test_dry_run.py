"""Dry runs: sizes, costs and the lines that start a run, with nothing written."""

import pytest

from mixerlab.lm.recipe.files import SHIPPED
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.training.dry_run import launch_lines
from tiny_runs import TINY, train


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_dry_runs_at_reduced_size(path, capsys, tmp_path):
    rows = {
        "paper_symbol_soup": ["data.min_tokens=40", "data.max_tokens=60"],
        "paper_diffuse_mqar": ["data.lags=[200]"],
        "small_symbol_soup": [],
        "small_diffuse_mqar": [],
    }.get(path.stem, ["data.seq_len=32", "data.vocab_size=300"])
    reduced = ["model.d_model=64", "model.n_layers=2", "trainer.batch_size=2", *rows]
    assert train(path, "--dry-run", *reduced, f"logging.dir={tmp_path}") == 0
    printed = capsys.readouterr().out
    for wanted in ("embedding", "mixer", "MLP", "head", "FLOPs per token", "memory", "outputs would go to"):
        assert wanted in printed
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_a_dry_run_prints_the_lines_that_start_it(at_the_root, capsys):
    nodes = ["strategy.num_nodes=2", "strategy.devices=8", "strategy=fsdp", "trainer.batch_size=1"]
    assert train(TINY, "--dry-run", *nodes) == 0
    out = capsys.readouterr().out
    assert "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d" in out
    assert f"-m mixerlab train {TINY} strategy.num_nodes=2" in out
    assert "srun --kill-on-bad-exit=1 --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 mixerlab train" in out
    assert "--dry-run" not in out.partition("start it")[2]
    assert train(TINY, *nodes) == 2
    assert "torchrun or SLURM must start the processes" in capsys.readouterr().err


def test_the_line_that_starts_a_run_can_be_pasted_into_a_shell():
    recipe = load_recipe("quickstart", strategy={"name": "ddp", "devices": 2, "accelerator": "cpu"})
    lines = launch_lines(recipe, ["quickstart", "model.mixer=[mamba2, sessa]"])
    assert lines["start it with"] == "mixerlab train quickstart 'model.mixer=[mamba2, sessa]'"
    torchrun = "torchrun --standalone --nproc-per-node 2 -m mixerlab train quickstart"
    assert lines["with torchrun"].startswith(torchrun)
    assert list(launch_lines(load_recipe("quickstart", strategy={"accelerator": "cpu"}), [])) == [
        "start it with"
    ]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "bf16-true"])
def test_a_dry_run_counts_weights_gradients_and_optimiser(at_the_root, capsys, tmp_path, precision):
    assert train(TINY, "--dry-run", f"logging.dir={tmp_path}", f"trainer.precision={precision}") == 0
    printed = capsys.readouterr().out
    assert "nats (uniform: 5.549)" in printed
    for part in ("weights ", "gradients ", "optimiser ", "kept for the backward pass of 4 rows "):
        assert part in printed
