"""What a failed step says: the first module whose numbers are not finite, the memory, the loading process."""

import os
import signal

import pytest
import torch
from mixerlab.lm.batches import Loaders
from mixerlab.lm.checkpoint import named_checkpoint, read
from mixerlab.lm.config import load_recipe
from mixerlab.lm.decoder import Decoder
from mixerlab.lm.diagnosis import first_non_finite, memory_advice
from mixerlab.lm.module import LanguageModel
from torch import nn

import train
from tests.lm.tiny_runs import ROOT, TINY, metric, run_dirs


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def options(tmp_path):
    return [f"logging.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture
def decoder():
    made = Decoder(50, d_model=16, n_layers=3, mixer=["sessa", "attention"], block="transformer").train()
    made.initialize(0)
    return made


def batches(n=2):
    ids = torch.randint(50, (n, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids], list(range(n))


class Spoilt(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * float("inf")


def spoil(module, how):
    forward = module.forward
    module.forward = lambda *args: how(forward(*args))


def test_nothing_is_found_in_a_healthy_step(decoder):
    assert first_non_finite(decoder, *batches()) is None
    assert not any(module._forward_hooks for module in decoder.modules()), "it leaves no hooks behind"


def test_the_innermost_module_whose_output_is_not_finite_is_named(decoder):
    spoil(decoder.blocks[1].mlp.up, lambda y: y / 0)
    assert first_non_finite(decoder, *batches()) == "the output of blocks.1.mlp.up (Linear)"


def test_a_module_whose_backward_pass_is_not_finite_is_named(decoder):
    spoil(decoder.blocks[1].mlp, Spoilt.apply)
    found = first_non_finite(decoder, *batches())
    # The dropout between them hands the very tensor on.
    down = "the gradient of the output of blocks.1.mlp.down (Linear)"
    assert found == f"{down}, in the backward pass from the output of blocks.1.dropout (Dropout)"


def test_a_weight_that_is_not_finite_is_seen_in_its_modules_output(decoder):
    with torch.no_grad():
        decoder.blocks[2].mixer.proj_fb.weight[0, 0] = float("nan")
    assert "blocks.2.mixer.proj_fb (Linear)" in first_non_finite(decoder, *batches())


class Scale(nn.Module):
    """Multiplies by a weight of one; may spoil that weight's gradient alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * Spoilt.apply(self.weight)


def test_a_parameter_whose_gradient_alone_is_not_finite_is_named(decoder):
    decoder.blocks[0].extra = Scale()
    spoil(decoder.blocks[0].mlp, decoder.blocks[0].extra)
    assert first_non_finite(decoder, *batches()) == "the gradient of the parameter blocks.0.extra.weight"


def test_the_second_micro_batch_is_looked_at_too():
    decoder = Decoder(50, d_model=16, n_layers=1, tie_embeddings=False)
    decoder.initialize(0)
    both, seeds = batches()
    both[1]["input_ids"][0, 0] = 49
    both[0]["input_ids"].clamp_(max=48)
    with torch.no_grad():
        decoder.embedding.weight[49] = float("inf")
    assert first_non_finite(decoder, both, seeds) == "the output of embedding (Embedding)"


def poison(monkeypatch, at):
    """Makes the forward pass of step `at` (from 1) not finite; also when it is run again."""
    forward = Decoder.forward
    start = LanguageModel.on_train_batch_start
    steps = []

    def noted(self, batch, batch_idx):
        steps.append(self.trainer.global_step + 1)
        start(self, batch, batch_idx)

    def poisoned(self, *args, **kwargs):
        nll, correct = forward(self, *args, **kwargs)
        return (nll * float("nan"), correct) if self.training and steps[-1] == at else (nll, correct)

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", noted)
    monkeypatch.setattr(Decoder, "forward", poisoned)


def test_the_failed_batch_is_saved_for_replay_and_the_run_goes_on_without_it(
    tmp_path, options, monkeypatch, capsys
):
    poison(monkeypatch, at=8)
    assert train.main([TINY, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    (run,) = run_dirs(tmp_path)
    saved = run / "non-finite-step-8-rank-0.pt"
    assert (
        f"step 8: loss nan, gradient norm nan; first not finite: the loss; the batch is in {saved}" in error
    )
    replay = torch.load(saved, weights_only=True)
    assert replay["step"] == 8
    assert replay["micro_batches"][0]["input_ids"].shape == (4, 64)
    weights = read(named_checkpoint(run, "last"))
    assert weights["global_step"] == 7, "the weights before the step"

    assert train.main([TINY, *options, "resume=auto", "trainer.on_non_finite=skip"]) == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))


def test_a_step_that_is_skipped_changes_no_weight_and_no_average(tmp_path, options, monkeypatch):
    extra = [
        *options,
        "trainer.on_non_finite=skip",
        "trainer.checkpoint_every=1",
        "trainer.keep_checkpoints=9",
    ]
    poison(monkeypatch, at=4)
    assert train.main([TINY, *extra, "trainer.steps=5"]) == 0
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


def test_out_of_memory_says_what_to_change_with_the_numbers(tmp_path, options, monkeypatch, capsys):
    step = LanguageModel.training_step

    def hungry(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            torch.empty(2**60)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "training_step", hungry)
    assert train.main([TINY, *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory in step 3, with 4 rows a micro-batch" in error
    assert "allocate 4611686018427387904 bytes" in error
    assert "trainer.batch_size=2 trainer.accumulate=2 (the same result)" in error
    assert "data.seq_len below 64" in error


@pytest.mark.parametrize(
    ("override", "absent"),
    [
        ("strategy.activation_checkpointing=full", "activation_checkpointing"),
        ("trainer.batch_size=1", "batch_size="),
    ],
)
def test_what_is_done_already_is_not_advised(override, absent):
    text = memory_advice(
        load_recipe(TINY, [override]), 1, torch.OutOfMemoryError("Tried to allocate 2 GiB. More")
    )
    assert "Tried to allocate 2 GiB" in text
    assert absent not in text


def test_a_loading_process_that_dies_ends_the_run_with_a_usable_checkpoint(
    tmp_path, options, monkeypatch, capsys
):
    loader = Loaders._loader

    def deadly(self, dataset, sampler):
        made = loader(self, dataset, sampler)
        batch = getattr(sampler, "batch", None)
        if batch is not None:
            sampler.batch = lambda k: ["die"] if k == 8 else batch(k)
            get = dataset.__class__.__getitem__
            monkeypatch.setattr(
                dataset.__class__,
                "__getitem__",
                lambda rows, i: os.kill(os.getpid(), signal.SIGKILL) if i == "die" else get(rows, i),
            )
        return made

    monkeypatch.setattr(Loaders, "_loader", deadly)
    assert train.main([TINY, *options, "trainer.num_workers=1"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a data loading process died" in error
    assert "resume=auto" in error
    (run,) = run_dirs(tmp_path)
    assert read(named_checkpoint(run, "last"))["global_step"] == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_vanish_end_the_run_with_a_usable_checkpoint(
    tmp_path, options, monkeypatch, capsys, workers
):
    start = LanguageModel.on_train_batch_start

    def lose(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            for file in (tmp_path / "cache").rglob("train.tokens"):
                file.unlink()
        start(self, batch, batch_idx)

    monkeypatch.setattr(LanguageModel, "on_train_batch_start", lose)
    assert train.main([TINY, *options, f"trainer.num_workers={workers}"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.cache_dir: ")
    assert "train.tokens was there and cannot be read now" in error
    (run,) = run_dirs(tmp_path)
    assert read(named_checkpoint(run, "last"))["global_step"] == 5
    monkeypatch.undo()
    monkeypatch.chdir(ROOT)
    assert train.main([TINY, *options, "resume=auto"]) == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))


def test_a_full_disk_ends_the_run_with_a_usable_checkpoint(tmp_path, options, monkeypatch, capsys):
    save = torch.save

    def full(tree, path):
        if tree["global_step"] == 15:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tree, path)

    monkeypatch.setattr(torch, "save", full)
    assert train.main([TINY, *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000015 cannot be written: [Errno 28] No space left on device" in error
    (run,) = run_dirs(tmp_path)
    assert read(named_checkpoint(run, "last"))["global_step"] == 10
    monkeypatch.setattr(torch, "save", save)
    assert train.main([TINY, *options, "resume=auto"]) == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))
