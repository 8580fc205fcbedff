"""The influence plot in TensorBoard: when it comes, what it may cost, and that training does not feel it."""

import struct
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mixerlab.lm.training.memory_plot as module
from mixerlab.lm.model.precision import to_bf16
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.training.loggers import TensorBoard
from mixerlab.lm.training.memory_plot import LENGTH, MemoryPlot
from mixerlab.mixers import MIXERS
from mixerlab.mixers.identity import Identity, IdentityConfig
from one_step import fake_trainer
from tiny_runs import TINY, metric, run_dirs, train


def images(folder):
    """(step, picture) of the influence plots."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return events.Images("influence") if "influence" in events.Tags()["images"] else []


def test_a_run_has_a_plot_at_every_validation_asked_for_and_trains_as_without(tmp_path, options):
    options = ["model.dropout=0.3", "logging.sample_tokens=0", *options]
    assert train(TINY, *options) == 0
    assert train(TINY, "logging.memory_every=1", *options) == 0
    without, run = run_dirs(tmp_path)
    pictures = images(run)
    assert [picture.step for picture in pictures] == [10, 20]
    assert all(picture.encoded_image_string[:4] == b"\x89PNG" for picture in pictures)
    assert metric(run, "train/loss") == metric(without, "train/loss"), "to the last bit, dropout and all"


def rows(length):
    return {"valid": [{"input_ids": torch.arange(length) % 257}]}


class Rig:
    """The callback before validations of a decoder at its initial values."""

    def __init__(self, folder, *overrides, length=40):
        recipe = load_recipe(TINY, ["trainer.steps=50", *overrides])
        self.board = TensorBoard(folder, 0)
        self.folder = folder
        self.trainer = fake_trainer(max_steps=50)
        self.trainer.loggers = [self.board]
        self.module = SimpleNamespace(decoder=make_decoder(recipe, 257).eval())
        self.callback = MemoryPlot(recipe, SimpleNamespace(val_datasets=lambda: rows(length)))

    def steps(self, *steps):
        """The steps of those whose validation has a plot."""
        for step in steps:
            self.trainer.global_step = step
            with torch.inference_mode():
                self.callback.on_validation_start(self.trainer, self.module)
        self.board.save()
        return [picture.step for picture in images(self.folder)]


def test_between_plots_there_are_as_many_validations_as_asked_and_the_last_has_one(tmp_path, at_the_root):
    rig = Rig(tmp_path, "logging.memory_every=2")
    assert rig.steps(10, 20, 30, 40, 50) == [20, 40, 50]


def test_other_ranks_than_the_first_measure_nothing(tmp_path, at_the_root, monkeypatch):
    rig = Rig(tmp_path, "logging.memory_every=1")
    rig.trainer.loggers = []
    rig.module.decoder = None
    assert rig.steps(10) == []


def test_rows_of_any_length_cost_no_more(tmp_path, at_the_root):
    assert Rig(tmp_path, "logging.memory_every=1", length=9999).callback.tokens.shape == (1, LENGTH)


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy.activation_checkpointing=full"],
        ["trainer.precision=bf16-true"],
        ["model.mixer=[mamba2, attention]", "model.block=transformer"],
    ],
    ids=str,
)
def test_it_takes_what_training_takes(tmp_path, at_the_root, overrides):
    rig = Rig(tmp_path, "logging.memory_every=1", *overrides)
    if "bf16" in overrides[0]:
        to_bf16(rig.module.decoder)
    assert rig.steps(10) == [10]


def test_where_nothing_can_be_measured_a_line_says_so(tmp_path, at_the_root, monkeypatch, caplog):
    class Opaque(Identity):
        def mix_fixed(self, x, values, segment_ids=None):
            return None

    monkeypatch.setitem(MIXERS._entries, "opaque", (IdentityConfig, Opaque))
    overrides = ["logging.memory_every=1", "model.mixer=opaque"]
    assert Rig(tmp_path / "a", *overrides).steps(10) == [10], "by its Jacobian"
    recomputed = Rig(tmp_path / "b", *overrides, "strategy.activation_checkpointing=full")
    assert recomputed.steps(10) == []
    assert "no routing that could be held" in caplog.text


class Twice(torch.autograd.Function):
    """Without setup_context, which torch.func asks for."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class NotForFunc(Identity):
    def forward(self, x, segment_ids=None):
        return Twice.apply(x)


class Unmeasurable(NotForFunc):
    def mix_fixed(self, x, values, segment_ids=None):
        raise torch.OutOfMemoryError("no memory\nat all")


def test_training_outlives_a_plot_that_cannot_be_made(tmp_path, options, monkeypatch, caplog):
    monkeypatch.setitem(MIXERS._entries, "bad", (IdentityConfig, Unmeasurable))
    few = ["model.mixer=bad", "logging.memory_every=1", "logging.sample_tokens=0", "trainer.steps=2"]
    assert train(TINY, *few, *options) == 0
    assert images(run_dirs(tmp_path)[0]) == []
    said = [r.getMessage() for r in caplog.records if "memory_every" in r.getMessage()]
    assert said == ["logging.memory_every: no plot: no memory"]


def test_without_the_decoders_jacobian_its_layers_are_drawn(tmp_path, at_the_root, monkeypatch, caplog):
    monkeypatch.setitem(MIXERS._entries, "bad", (IdentityConfig, NotForFunc))
    rig = Rig(tmp_path, "logging.memory_every=1", "model.mixer=bad")
    assert rig.steps(10) == [10]
    (record,) = [r for r in caplog.records if "memory_every" in r.getMessage()]
    assert "no curve of the decoder's Jacobian: " in record.getMessage()
    assert "setup_context" in record.getMessage()


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_request_to_end_is_no_failure(tmp_path, at_the_root, monkeypatch, end):
    def ends(*_, **__):
        raise end

    monkeypatch.setattr(module, "measure", ends)
    with pytest.raises(end):
        Rig(tmp_path, "logging.memory_every=1").steps(10)


def test_a_picture_keeps_its_size(tmp_path):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 30, 20, 8, 6, 0, 0, 0)
    board = TensorBoard(tmp_path, 0)
    board.log_picture("influence", header, 3)
    board.save()
    (picture,) = images(tmp_path)
    assert (picture.step, picture.width, picture.height) == (3, 30, 20)
    assert picture.encoded_image_string == header
