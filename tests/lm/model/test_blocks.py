"""What surrounds a mixer: MLP widths, norms in their weights' precision, diagnostics on the way."""

import pytest
import torch

from mixerlab.lm.model.blocks import default_mlp_dim, make_norm
from mixerlab.lm.model.decoder import Decoder


def test_the_mlp_has_four_widths_and_that_of_swiglu_as_many_parameters_in_three_matrices():
    assert default_mlp_dim(96, "gelu") == 384
    assert default_mlp_dim(96, "swiglu") == 256
    assert default_mlp_dim(100, "swiglu") == 320, "a multiple of 64"


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_are_computed_in_the_precision_of_their_weights(kind):
    norm = make_norm(kind, 8)
    x = torch.randn(3, 8).bfloat16()
    assert norm(x).dtype == torch.float32
    assert torch.equal(norm(x), norm(x.float()))


@pytest.mark.parametrize("block", ["gated", "transformer"])
def test_diagnostics_are_collected_in_the_order_of_the_layers_and_change_nothing(block):
    decoder = Decoder(50, d_model=16, n_layers=3, mixer=["sessa", "identity"], block=block).eval()
    decoder.initialize(0)
    ids = torch.randint(50, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, collected = decoder(ids, diagnose=True)
        assert torch.equal(logits, decoder(ids))
    assert [sorted(layer) for layer in collected] == [sorted(collected[0]), [], sorted(collected[0])]
    assert "gamma" in collected[0]
