"""The Mamba mixers' convolution against torch's conv1d, and against documents apart."""

import pytest
import torch
from torch import nn

from mixerlab.mixers.convolution import causal_conv

X = 6


def make(taps, bias):
    torch.manual_seed(0)
    return nn.Conv1d(X, X, taps, groups=X, bias=bias).double(), torch.randn(2, taps - 1 + 11, X).double()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_equals_conv1d_with_all_gradients(taps, bias):
    conv, padded = make(taps, bias)
    padded.requires_grad_()
    ours, expected = causal_conv(padded, conv), conv(padded.mT).mT
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(expected)
    wanted = [padded, *conv.parameters()]
    for a, b in zip(
        torch.autograd.grad(ours, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_documents_are_as_if_apart_with_all_gradients():
    conv, padded = make(4, True)
    with torch.no_grad():
        padded[:, :3] = 0
    padded.requires_grad_()
    lengths = [1, 2, 8]
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    ours = causal_conv(padded, conv, ids)
    pieces = padded[:, 3:].split(lengths, dim=1)
    expected = torch.cat([causal_conv(nn.functional.pad(p, (0, 0, 3, 0)), conv) for p in pieces], dim=1)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(expected)
    ours_g = torch.autograd.grad(ours, [padded, *conv.parameters()], cotangent)
    expected_g = torch.autograd.grad(expected, [padded, *conv.parameters()], cotangent)
    torch.testing.assert_close(ours_g[0][:, 3:], expected_g[0][:, 3:])
    for a, b in zip(ours_g[1:], expected_g[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("packed", [False, True])
def test_finite_differences_agree(packed):
    conv, padded = make(3, True)
    ids = torch.tensor([[0] * 4 + [1] * 7, [0] * 10 + [1]]) if packed else None

    def run(padded, weight, bias):
        conv_ = nn.Conv1d(X, X, 3, groups=X)
        return torch.func.functional_call(
            Holder(conv_, ids), {"conv.weight": weight, "conv.bias": bias}, padded
        )

    inputs = [y.detach().requires_grad_() for y in (padded, conv.weight, conv.bias)]
    assert torch.autograd.gradcheck(run, inputs)


class Holder(nn.Module):
    def __init__(self, conv, ids):
        super().__init__()
        self.conv, self.ids = conv, ids

    def forward(self, padded):
        return causal_conv(padded, self.conv, self.ids)


def test_a_whole_jacobian_is_that_of_conv1d():
    conv, padded = make(4, True)
    ours = torch.func.jacrev(lambda y: causal_conv(y, conv))(padded[:1])
    expected = torch.func.jacrev(lambda y: conv(y.mT).mT)(padded[:1])
    torch.testing.assert_close(ours, expected)
