"""What a failed step says: the first module whose numbers are not finite, the memory, the loading process."""

import errno
import os
import signal
import time
from functools import partial

import pytest
import torch
from torch import nn

from mixerlab.data import DataError
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import read
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.batches import Loaders
from mixerlab.lm.training.diagnosis import explain, first_non_finite, memory_advice
from mixerlab.options import ConfigError
from tiny_runs import TINY, before_step, metric, run_dirs, train


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


def test_the_gradients_that_the_failed_step_left_are_not_taken_for_those_of_the_batch(decoder):
    for parameter in decoder.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    assert first_non_finite(decoder, *batches()) is None


def test_the_second_micro_batch_is_looked_at_too():
    decoder = Decoder(50, d_model=16, n_layers=1)
    decoder.initialize(0)
    both, seeds = batches()
    both[1]["input_ids"][0, 0] = 49
    both[0]["input_ids"].clamp_(max=48)
    with torch.no_grad():
        decoder.embedding.weight[49] = float("inf")
    assert first_non_finite(decoder, both, seeds) == "the output of embedding (Embedding)"


def test_out_of_memory_says_what_to_change_with_the_numbers(tmp_path, options, monkeypatch, capsys):
    before_step(monkeypatch, 2, lambda module: torch.empty(2**60), lambda: train(TINY, *options), code=1)
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
    def die():
        """Once the rows before have arrived: a death in the midst of handing them over looks different."""
        (run,) = run_dirs(tmp_path)
        for _ in range(1200):
            if 7 in metric(run, "train/loss"):  # the rows of step 8 are read ahead
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL)

    loader = Loaders._loader

    def deadly(self, dataset, sampler, *collate):
        made = loader(self, dataset, sampler, *collate)
        rows = getattr(sampler, "_rows", None)
        if rows is not None:
            sampler._rows = lambda first, steps: [
                ["die"] if step == 8 else found for step, found in enumerate(rows(first, steps), first)
            ]
            get = dataset.__class__.__getitem__
            monkeypatch.setattr(
                dataset.__class__, "__getitem__", lambda rows, i: die() if i == "die" else get(rows, i)
            )
        return made

    monkeypatch.setattr(Loaders, "_loader", deadly)
    assert train(TINY, *options, "trainer.num_workers=1") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "a data loading process died" in error
    assert "resume=auto" in error
    (run,) = run_dirs(tmp_path)
    assert read(Run(run).checkpoints.named("last"))["global_step"] == 5


@pytest.mark.parametrize("workers", [0, 1])
def test_data_that_are_cut_short_end_the_run_with_a_usable_checkpoint(
    tmp_path, options, monkeypatch, capsys, workers
):
    def lose(module):
        for file in (tmp_path / "cache").rglob("train.tokens"):
            os.truncate(file, 100)

    training = partial(train, TINY, *options, f"trainer.num_workers={workers}")
    before_step(monkeypatch, 6, lose, training, code=2)
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: data.cache_dir: ")
    assert "train.tokens is shorter than it was" in error
    (run,) = run_dirs(tmp_path)
    assert read(Run(run).checkpoints.named("last"))["global_step"] == 5
    assert train(TINY, *options, "resume=auto") == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))


def test_a_full_disk_ends_the_run_with_a_usable_checkpoint(tmp_path, options, monkeypatch, capsys):
    save = torch.save

    def full(tree, file):
        if tree["global_step"] == 15:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(tree, file)

    monkeypatch.setattr(torch, "save", full)
    assert train(TINY, *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step-00000015 cannot be written: [Errno 28] No space left on device" in error
    (run,) = run_dirs(tmp_path)
    assert read(Run(run).checkpoints.named("last"))["global_step"] == 10
    monkeypatch.setattr(torch, "save", save)
    assert train(TINY, *options, "resume=auto") == 0
    assert sorted(metric(run, "train/loss")) == list(range(1, 21))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConfigError("seed = -1"), "seed = -1"),
        (DataError("data.files: gone"), "data.files: gone"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. \nMore"),
            "a data loading process died",
        ),
        (OSError(errno.ENOSPC, "No space left on device", "x.ckpt"), "the disk is full: x.ckpt. Make room"),
        (PermissionError(errno.EACCES, "Permission denied", "x.csv"), "x.csv: Permission denied"),
        (RuntimeError("[gloo] Connection closed by peer"), "lost another process of the run"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory before training began"),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "a data loading process died"),
        (ZeroDivisionError("by zero"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_what_the_user_can_mend_is_told_and_a_fault_in_the_code_is_not(error, said):
    line = explain(error)
    if said is None:
        assert line is None
    else:
        assert line.startswith(said)
        assert "\n" not in line
