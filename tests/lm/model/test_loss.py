"""The loss: the cross-entropy of the logits, without ever holding them all."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.model.loss import LOGITS_AT_ONCE, token_losses


def test_losses_are_the_cross_entropy_of_the_logits():
    decoder = Decoder(50, d_model=16, n_layers=3).eval()
    decoder.initialize(0)
    decoder.double()
    ids = torch.randint(50, (3, 7), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1).clone()
    labels[1, 2:5] = -100
    nll, correct = decoder(ids, labels)
    logits = decoder(ids)
    expected = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=-100, reduction="none")
    torch.testing.assert_close(nll, expected)
    assert torch.equal(correct, logits.argmax(-1) == labels)
    assert (nll[1, 2:5] == 0).all()
    ours = torch.autograd.grad(nll.sum(), list(decoder.parameters()))
    theirs = torch.autograd.grad(expected.sum(), list(decoder.parameters()))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_never_holds_all_logits(dtype):
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    positions, vocab = 512, 5000
    x = torch.randn(2, positions // 2, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, 8, dtype=dtype, requires_grad=True)
    with Largest() as largest:
        nll, _ = token_losses(x, weight, torch.zeros(2, positions // 2, dtype=torch.int64))
        nll.sum().backward()
    assert nll.dtype == torch.float32
    assert largest.elements <= positions * vocab / 8
    saved: list[int] = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_losses(x, weight, torch.zeros(2, positions // 2, dtype=torch.int64))
    assert max(saved, default=0) <= weight.numel()


def test_many_logits_are_made_in_blocks_of_a_fixed_size(monkeypatch):
    assert LOGITS_AT_ONCE * 4 == 128 * 2**20, "bytes in float32"
    monkeypatch.setattr("mixerlab.lm.model.loss.LOGITS_AT_ONCE", 100)
    sizes, linear = [], F.linear

    def noted(x, weight):
        sizes.append(x.shape[0] * weight.shape[0])
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", noted)
    with torch.no_grad():
        token_losses(torch.randn(3, 21, 4), torch.randn(10, 4), torch.zeros(3, 21, dtype=torch.int64))
    assert max(sizes) <= 100
    assert sum(sizes) == 63 * 10
