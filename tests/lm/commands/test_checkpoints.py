"""Listing, checking and rewriting the checkpoints of a run."""

import pytest
import torch

from mixerlab.__main__ import main
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run


@pytest.fixture
def run(tmp_path):
    """As much of a run as the command looks at."""
    made = Run(tmp_path / "run")
    for step, loss in ((10, 3.0), (20, 2.0), (30, None)):
        weights = {"a": torch.arange(15.0).view(5, 3)}
        save({"global_step": step, "valid_loss": loss, "state_dict": weights}, made.checkpoints.at(step))
    made.save_recipe(load_recipe("quickstart"))
    return made


def test_the_command_lists_checks_and_rewrites(run, capsys):
    assert main(["checkpoints", str(run.path)]) == 0
    out = capsys.readouterr().out
    assert "step-00000020: one file, 0.0 MB, whole, validation loss 2.0000, the best\n" in out
    assert (
        main(["checkpoints", str(run.path), "--to", "sharded", "--shards", "3", "--checkpoint", "best"]) == 0
    )
    assert "step-00000020: 3 shards" in capsys.readouterr().out
    assert main(["checkpoints", str(run.path), "--to", "one-file", "--checkpoint", "20"]) == 0
    assert "step-00000020: one file" in capsys.readouterr().out
    state = run.checkpoints.at(20) / "state.ckpt"
    state.write_bytes(state.read_bytes()[: state.stat().st_size // 2])
    assert main(["checkpoints", str(run.path)]) == 1
    assert "step-00000020: damaged: state.ckpt has" in capsys.readouterr().out
    assert main(["checkpoints", str(run.path), "--to", "one-file", "--checkpoint", "20"]) == 2
    assert main(["checkpoints", str(run.path / "nowhere")]) == 2
    assert "nowhere: no such folder" in capsys.readouterr().err


def test_a_folder_without_checkpoints_is_named(run, capsys):
    (run.path / "empty").mkdir()
    Run(run.path / "empty").save_recipe(load_recipe("quickstart"))
    assert main(["checkpoints", str(run.path / "empty")]) == 2
    assert "it has no checkpoints/step-*, so there is nothing to load" in capsys.readouterr().err


def test_rewriting_needs_the_lock(run, capsys):
    with Run(run.path).lock():
        assert main(["checkpoints", str(run.path), "--to", "sharded"]) == 2
    assert "another process is training that run" in capsys.readouterr().err
    assert main(["checkpoints", str(run.path), "--to", "sharded"]) == 0


def test_damage_in_other_files_of_the_run_is_listed_too(run, capsys):
    run.save_data_fingerprint("abc")
    (run.path / "data.fingerprint").write_text("abx")
    assert main(["checkpoints", str(run.path)]) == 1
    out = capsys.readouterr().out
    assert f"damaged: {run.path / 'data.fingerprint'} is not what was written there" in out
    assert "step-00000020: one file" in out
