"""New runs that start from the weights of others."""

import re
import shutil

import pytest
import torch

from mixerlab.lm.run.checkpoint import read
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.weights import find_weights
from started_runs import FSDP, finish, layout, start
from tiny_runs import TINY, before_step, interrupt, metric, run_dirs, train


def weights_of(run):
    return read(Run(run).checkpoints.last())["state_dict"]


@pytest.mark.parametrize("named_by", ["run", "checkpoint"])
def test_a_new_run_starts_from_the_weights_with_a_new_optimiser_and_schedule(
    finished, tmp_path, options, monkeypatch, capsys, named_by
):
    source, _ = finished
    saved = weights_of(source)
    folder = source if named_by == "run" else Run(source).checkpoints.last()

    def look(module):
        for name, value in module.state_dict().items():
            assert torch.equal(value, saved[name]), name
        assert not module.optimizers().state
        look.done = True

    longer_rows = ["data.seq_len=128", "trainer.steps=2"]  # which change no weight
    arguments = [TINY, *options, *longer_rows, f"init_from={folder}"]
    before_step(monkeypatch, 0, look, lambda: train(*arguments))
    assert look.done
    said = capsys.readouterr().out
    assert f"step-00000020: {len(saved)} of {len(saved)} tensors" in said
    assert "initialised anew" not in said
    assert list(metric(run_dirs(tmp_path)[0], "train/loss")) == [1, 2]


def test_what_does_not_fit_is_named_and_the_rest_is_taken(finished, tmp_path, options, monkeypatch, capsys):
    source, _ = finished
    saved = weights_of(source)
    taken = {}
    arguments = [TINY, *options, "trainer.steps=1", f"init_from={source}", "model.mixer=[sessa,mamba2]"]

    def look(module):
        taken.update({name: value.clone() for name, value in module.state_dict().items()})

    before_step(monkeypatch, 0, look, lambda: train(*arguments))
    same = {name for name in taken if name in saved and torch.equal(taken[name], saved[name])}
    assert "decoder.embedding.weight" in same
    assert any(name.startswith("decoder.blocks.0.") and ".mixer." in name for name in same)
    said = capsys.readouterr().out
    assert "initialised anew: blocks.1.mixer." in said
    assert re.search(r"not used: .*blocks\.1\.mixer\.", said)


def test_a_run_that_goes_on_needs_the_weights_no_more(finished, tmp_path, options, monkeypatch):
    source = tmp_path / "source"
    shutil.copytree(finished[0], source)
    arguments = [TINY, *options, f"init_from={source}"]
    assert train(*arguments) == 0
    interrupt(monkeypatch, arguments, step=12)
    shutil.rmtree(source)
    assert train(*arguments, "resume=auto") == 0
    whole, resumed = run_dirs(tmp_path)
    assert metric(whole, "train/loss") == metric(resumed, "train/loss")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=nowhere"], "nowhere: no such folder; expected runs/<recipe name>/<run>"),
        (["init_from={source}", "model.d_model=16", "model.mixer=attention"], "init_from: no tensor of"),
        (
            ["init_from={source}", "data.tokenizer=bpe", "data.vocab_size=300"],
            "has another tokenizer than the data",
        ),
        (["init_from={source}/checkpoints/step-00000099"], "no such checkpoint; that run has"),
    ],
)
def test_weights_that_cannot_be_taken_are_refused_in_one_line(
    finished, tmp_path, options, capsys, overrides, message
):
    given = [text.format(source=finished[0]) for text in overrides]
    assert train(TINY, *options, *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # behind the progress of tokenising
    assert message in line
    assert "init_from" in line
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_says_too_that_there_are_no_such_weights(options, capsys):
    assert train(TINY, *options, "init_from=nowhere", "--dry-run") == 2
    assert "init_from = 'nowhere'" in capsys.readouterr().err


def test_a_checkpoint_may_be_named_from_within_its_folder(finished, monkeypatch):
    folder = finished[0] / "checkpoints"
    monkeypatch.chdir(folder)
    assert find_weights("step-00000020") == folder / "step-00000020"


@pytest.mark.slow
def test_shards_start_from_the_same_weights(finished, tmp_path, options):
    given = [*options, f"init_from={finished[0]}", "trainer.steps=2"]
    finish(start(*given, *layout(1, 4)))
    finish(start(*given, *FSDP, *layout(2, 2)))
    one, two = (metric(run, "train/loss") for run in run_dirs(tmp_path))
    assert one == pytest.approx(two, abs=1e-5)
    assert one[1] < metric(finished[0], "train/loss")[1] - 0.5, "it has learnt something before"
