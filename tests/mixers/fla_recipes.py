"""Recipes with fla's layers: trained, interrupted, resumed, generated from, sharded. Run by test_fla.py."""

import subprocess
import sys

import pytest
import torch

if not torch.cuda.is_available():
    import fla_on_cpu  # noqa: F401  (before fla)
import mixerlab.mixers.fla  # noqa: F401  (registers them, installed or not)
from tiny_runs import ROOT, TINY, generate, interrupt, metric, packed_documents, places, run_dirs, train

SMALL = [
    *("model.mixer=[{name: gla, n_heads: 2}, attention]", "model.d_model=16", "data.seq_len=24"),
    *("trainer.steps=4", "trainer.batch_size=2", "trainer.val_every=2", "trainer.checkpoint_every=1"),
    *("trainer.val_batches=1", "logging.sample_tokens=3"),
]


@pytest.fixture
def options(tmp_path):
    return [TINY, *SMALL, *packed_documents(tmp_path), *places(tmp_path)]


def test_an_interrupted_run_continues_and_generates(options, tmp_path, monkeypatch):
    assert train(*options) == 0
    interrupt(monkeypatch, options, step=2)
    assert train(*options, "resume=auto") == 0
    whole, resumed = run_dirs(tmp_path)
    for name in ("train/loss", "train/gradient_norm", "valid/loss"):
        assert metric(resumed, name) == metric(whole, name)
    assert generate(resumed, "--prompt", "a b", "--max-new-tokens", "3") == 0


def test_two_ranks_with_shards_train_as_one(options, tmp_path):
    plugins = "[mixerlab.mixers.fla]" if torch.cuda.is_available() else "[fla_on_cpu, mixerlab.mixers.fla]"
    command = [sys.executable, "-m", "mixerlab", "train", *options, f"plugins={plugins}"]
    for strategy in (["trainer.accumulate=2"], ["strategy=fsdp", "strategy.devices=2"]):
        done = subprocess.run([*command, *strategy], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    one, two = run_dirs(tmp_path)
    assert metric(two, "train/loss") == pytest.approx(metric(one, "train/loss"), rel=1e-4)
