"""Steps whose loss or gradient is not a number: saved, named, left out or the end of the run."""

import math

import pytest
import torch

from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import CheckpointError, read, read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.module import LanguageModel
from mixerlab.lm.training.non_finite import NonFiniteError, NonFiniteSteps
from one_step import fake_trainer, micro_batches
from started_runs import FSDP, LONG, finish, layout, plugin, start
from tiny_runs import TINY, metric, run_dirs, train

SPOILS_A_MIXER = """
from mixerlab.lm.training.module import LanguageModel
step = LanguageModel.training_step
def spoil(self, micro_batches, i):
    if self.world.rank == 1 and self.trainer.global_step == 5:
        self.decoder.blocks[1].mixer.register_forward_hook(lambda m, i, o: o / 0)
    return step(self, micro_batches, i)
LanguageModel.training_step = spoil
"""


def poison(monkeypatch, at):
    """Makes the forward pass of step `at` (from 1) not finite; also when it is run again."""
    forward, step = Decoder.forward, LanguageModel.training_step
    steps = []

    def noted(self, micro_batches, batch_idx):
        steps.append(self.trainer.global_step + 1)
        return step(self, micro_batches, batch_idx)

    def poisoned(self, *args, **kwargs):
        nll, correct = forward(self, *args, **kwargs)
        return (nll * float("nan"), correct) if self.training and steps[-1] == at else (nll, correct)

    monkeypatch.setattr(LanguageModel, "training_step", noted)
    monkeypatch.setattr(Decoder, "forward", poisoned)


def test_the_failed_batch_is_saved_for_replay_and_the_run_goes_on_without_it(
    tmp_path, options, monkeypatch, capsys
):
    poison(monkeypatch, at=8)
    assert train(TINY, *options) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    (run,) = run_dirs(tmp_path)
    saved = run / "non-finite-step-8-rank-0.pt"
    assert (
        f"step 8: loss nan, gradient norm nan; first not finite: the loss; the batch is in {saved}" in error
    )
    replay = torch.load(saved, weights_only=True)
    assert replay["step"] == 8
    assert replay["micro_batches"][0]["input_ids"].shape == (4, 64)
    weights = read(Run(run).checkpoints.named("last"))
    assert weights["global_step"] == 7, "the weights before the step"

    assert train(TINY, *options, "resume=auto", "trainer.on_non_finite=skip") == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))


def test_a_step_that_is_skipped_changes_no_weight_and_no_average(tmp_path, options, monkeypatch):
    extra = [
        *options,
        "trainer.on_non_finite=skip",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=9",
    ]
    poison(monkeypatch, at=4)
    assert train(TINY, *extra, "trainer.steps=5") == 0
    (run,) = run_dirs(tmp_path)
    three, four, five = (read(run / "checkpoints" / f"step-{n:08d}") for n in (3, 4, 5))
    for name, weight in three["state_dict"].items():
        assert torch.equal(weight, four["state_dict"][name])
    moments = [state["optimizer_states"][0]["state"][0] for state in (three, four, five)]
    assert torch.equal(moments[0]["exp_avg"], moments[1]["exp_avg"])
    assert [float(m["step"]) for m in moments] == [3, 3, 4]
    assert not torch.equal(
        three["state_dict"]["decoder.norm.weight"], five["state_dict"]["decoder.norm.weight"]
    )


def test_a_gradient_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    tmp_path, options, monkeypatch, capsys
):
    backward = LanguageModel.manual_backward

    def poisoned(self, loss):
        backward(self, loss * float("nan") if self.trainer.global_step == 7 else loss)

    monkeypatch.setattr(LanguageModel, "manual_backward", poisoned)
    assert train(TINY, *options) == 1
    error = capsys.readouterr().err
    assert "step 8: loss" in error
    assert "gradient norm nan; first not finite: " in error
    assert "lower optim.lr" in error
    run = run_dirs(tmp_path)[0]
    state = read(Run(run).checkpoints.named("last"))
    assert state["global_step"] == 7
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert not (run / "result.json").exists()


def handler(tmp_path, options, **world):
    recipe = load_recipe(TINY, options)
    decoder = Decoder(257, d_model=16, n_layers=1)
    decoder.initialize(0)
    with torch.no_grad():
        decoder.norm.bias[0] = float("inf")
    run = Run(tmp_path / "run")
    run.checkpoints.folder.mkdir(parents=True)
    return NonFiniteSteps(recipe, decoder, World(**world), run)


def test_a_batch_that_cannot_be_saved_and_a_checkpoint_that_cannot_be_written_are_told(
    tmp_path, options, monkeypatch
):
    steps = handler(tmp_path, options)

    def full(*args):
        raise OSError(28, "No space left on device")

    def refuse(folder):
        raise CheckpointError(f"checkpoint {folder} cannot be written")

    monkeypatch.setattr(torch, "save", full)
    trainer = fake_trainer(6, save_checkpoint=refuse)
    with pytest.raises(NonFiniteError) as caught:
        steps.handle(trainer, math.nan, math.inf, micro_batches((4,)), [1])
    assert "step 7: loss nan, gradient norm inf; first not finite: the output of norm (LayerNorm)" in str(
        caught.value
    )
    assert "the batch could not be saved: [Errno 28] No space left on device" in str(caught.value)
    assert "step-00000006 cannot be written" in str(caught.value)


def test_the_rank_whose_module_made_the_number_is_named_and_not_one_whose_gradient_it_reached(
    tmp_path, options
):
    steps = handler(tmp_path, options, devices=2)
    names = ["the gradient of the parameter norm.weight", "the output of blocks.1.mixer"]
    steps.world.gather = lambda name: names
    steps.world.ask_main = lambda question: question()
    trainer = fake_trainer(6, save_checkpoint=lambda folder: None)
    with pytest.raises(
        NonFiniteError,
        match=r"first not finite on rank 1: the output of blocks\.1\.mixer; the batch is in .*-rank-1\.pt",
    ):
        steps.handle(trainer, math.nan, math.nan, micro_batches((4,)), [1])


@pytest.mark.slow
def test_a_number_that_is_not_finite_on_one_shard_is_named_on_its_rank(tmp_path, unequal):
    mishap = plugin(tmp_path, SPOILS_A_MIXER)
    process = start(*unequal, *FSDP, *LONG, *layout(2, 2), "plugins=[mishap]", **mishap)
    _, err = finish(process, code=1)
    assert err.count("stopped: ") == 1
    assert "step 6: loss" in err
    assert "first not finite on rank 1: the output of blocks.1.mixer" in err
    (run,) = run_dirs(tmp_path)
    assert read_meta(Run(run).checkpoints.last())["global_step"] == 5
