"""Low precision: what stays in float32, and where autocast reaches."""

import lightning as L
import pytest
import torch

from mixerlab.lm.model.decoder import Decoder, spared_parameters
from mixerlab.lm.model.precision import precision_plugin, to_bf16


def test_bf16_weights_leave_the_sensitive_ones_in_float32():
    decoder = Decoder(50, d_model=16, n_layers=3, mixer="sessa")
    decoder.initialize(0)
    to_bf16(decoder)
    low = {name for name, p in decoder.named_parameters() if p.dtype == torch.bfloat16}
    assert {name for name, p in decoder.named_parameters() if p.ndim == 2} == low
    ids = torch.randint(50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        nll, _ = decoder(ids, ids)
    nll.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in decoder.parameters())


def test_bf16_true_casts_all_but_the_sensitive_weights():
    decoder = Decoder(50, d_model=16, n_layers=2, mixer=["mamba2", "sessa"])
    precision_plugin("bf16-true", "cpu").convert_module(decoder)
    kept = {name for name, p in decoder.named_parameters() if p.dtype == torch.float32}
    assert kept == spared_parameters(decoder, "keep_float32")
    assert {"norm.weight", "blocks.0.mixer.A_log", "blocks.1.mixer.gamma_bias"} <= kept


@pytest.mark.parametrize(("precision", "low"), [("32", False), ("bf16-mixed", True), ("bf16-true", True)])
def test_forward_passes_are_in_low_precision_and_the_rest_of_the_step_is_not(precision, low):
    plugin = precision_plugin(precision, "cpu")
    with plugin.forward_context():
        assert torch.is_autocast_enabled("cpu") == low
    with plugin.train_step_context():
        assert not torch.is_autocast_enabled("cpu")
    with plugin.val_step_context():
        assert torch.is_autocast_enabled("cpu") == low


def test_bf16_mixed_keeps_the_weights_as_they_are():
    decoder = Decoder(50, d_model=16, n_layers=1)
    precision_plugin("bf16-mixed", "cpu").convert_module(decoder)
    assert {p.dtype for p in decoder.parameters()} == {torch.float32}


def test_lightning_accepts_the_plugins():
    for precision in ("32", "bf16-mixed", "bf16-true"):
        plugin = precision_plugin(precision, "cpu")
        trainer = L.Trainer(accelerator="cpu", logger=False, plugins=[plugin])
        assert trainer.precision_plugin is plugin
