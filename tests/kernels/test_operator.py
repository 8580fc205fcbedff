"""The harness of operators with hand-written gradients, on a small one against autograd.

Letters: B batch, T time.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from dispatched import dispatched
from mixerlab.kernels.operator import operator

AUTOCAST: list[bool] = []
"""Whether it was on in each call of a pass."""


def _forward(x: Tensor, y: Tensor, hidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    AUTOCAST.append(torch.is_autocast_enabled("cpu"))
    product, mean = plain(x, y, hidden, scale)
    return product, mean, x.amax(1)


def _backward(
    dproduct: Tensor | None,
    dmean: Tensor | None,
    y: Tensor,
    x: Tensor,
    mean: Tensor,
    hidden: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    AUTOCAST.append(torch.is_autocast_enabled("cpu"))
    dx, dy = torch.zeros_like(x), torch.zeros_like(y)
    if dproduct is not None:
        dproduct = scale * (dproduct if hidden is None else dproduct.masked_fill(hidden, 0.0))
        dx, dy = dproduct * y, dproduct * x
    if dmean is not None:
        dx += (mean / x.shape[1] * dmean)[:, None]
    return dx, dy


toy = operator(
    "toy",
    _forward,
    _backward,
    outputs=("product", "mean", "most"),
    forward_fake=lambda x, y, hidden, scale: (x.new_empty(x.shape), *(x.new_empty(len(x)) for _ in range(2))),
    backward_fake=lambda dproduct, dmean, y, x, *_: (x.new_empty(x.shape), y.new_empty(y.shape)),
)


def plain(x, y, hidden=None, scale=0.5):
    """scale x y (B, T), 0 where hidden, and the mean of x, exponentiated (B,)."""
    product = scale * x * y  # (B, T)
    return product if hidden is None else product.masked_fill(hidden, 0.0), x.mean(1).exp()


def ours(x, y, hidden=None, scale=0.5):
    return toy(x, y, hidden, scale)[:2]


HIDDEN = torch.tensor([[False, True, False], [True, False, False]])


def make_inputs():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(2, 3, dtype=torch.float64, generator=generator) for _ in range(2)]


def loss(run, x, y, hidden=None):
    product, mean = run(x, y, hidden)
    return product.square().sum() + mean.cos().sum()


def assert_same(transform, *arguments):
    runs: list[Any] = [ours, plain]
    actual, expected = (tree_leaves(transform(run)(*arguments)) for run in runs)
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hidden", [None, HIDDEN])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)])
def test_autograd_takes_the_gradient_of_the_outputs_that_are_used(hidden, used):
    inputs = [x.requires_grad_() for x in make_inputs()]
    assert torch.autograd.gradcheck(lambda x, y: tuple(ours(x, y, hidden)[i] for i in used), inputs)


def test_an_output_whose_gradient_is_not_taken_has_none():
    inputs = [x.requires_grad_() for x in make_inputs()]
    assert [x.requires_grad for x in toy(*inputs, None, 0.5)] == [True, True, False]


def test_only_what_the_backward_pass_takes_is_kept():
    kept = []

    def keep(x):
        kept.append(x.data_ptr())
        return x

    x, y = (x.requires_grad_() for x in make_inputs())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _, mean, _ = toy(x, y, HIDDEN, 0.5)
    assert kept == [x.data_ptr() for x in (y, x, mean, HIDDEN)]


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_torch_func(hidden):
    x, y = make_inputs()
    assert_same(lambda run: torch.func.grad(lambda x, y: loss(run, x, y, hidden), argnums=(0, 1)), x, y)
    assert_same(lambda run: torch.func.vjp(lambda x, y: run(x, y, hidden), x, y)[1], (x, y[:, 0]))
    assert_same(lambda run: torch.func.jacrev(lambda x, y: run(x, y, hidden), argnums=(0, 1)), x, y)


@pytest.mark.parametrize("dims", [(0, 0), (1, None), (None, 2)])
def test_vmap(dims):
    stacked = [
        x if dim is None else torch.stack([x, x + 1, -x], dim)
        for x, dim in zip(make_inputs(), dims, strict=True)
    ]
    assert_same(lambda run: torch.vmap(lambda x, y: run(x, y, HIDDEN), in_dims=dims), *stacked)
    assert_same(
        lambda run: torch.vmap(torch.func.grad(lambda x, y: loss(run, x, y, HIDDEN), (0, 1)), in_dims=dims),
        *stacked,
    )
    assert_same(
        lambda run: torch.func.grad(
            lambda *z: torch.vmap(lambda *z: loss(run, *z), in_dims=dims)(*z).sum(), (0, 1)
        ),
        *stacked,
    )


def test_the_mapped_dimension_may_be_of_what_has_no_gradient():
    x, y = make_inputs()
    assert_same(
        lambda run: torch.vmap(lambda hidden: torch.func.grad(lambda x: loss(run, x, y, hidden))(x)),
        torch.stack([HIDDEN, ~HIDDEN]),
    )


@pytest.mark.parametrize("used", [(0,), (0, 1)])
def test_torch_compile_sees_one_call_in_each_pass(used):
    calls = []

    def record(graph, _):
        calls.append([str(node.target) for node in graph.graph.nodes if "mixerlab" in str(node.target)])
        return make_boxed_func(graph.forward)

    def summed(x, y, hidden):
        outputs = ours(x, y, hidden)
        return sum(outputs[i].cos().sum() for i in used)

    compiled = torch.compile(summed, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    for inputs in (make_inputs(), [torch.cat([x, x], dim=1) for x in make_inputs()]):
        x, y = (z.requires_grad_() for z in inputs)
        hidden = torch.zeros_like(x, dtype=torch.bool)
        gradients = [torch.autograd.grad(run(x, y, hidden), (x, y)) for run in (compiled, summed)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert calls[:2] == [["mixerlab.toy_forward.default"], ["mixerlab.toy_backward.default"]]


def test_torch_compile_takes_a_vmap():
    def mapped(x, y):
        return torch.vmap(ours)(torch.stack([x, -x]), torch.stack([y, y]))

    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    inputs = make_inputs()
    assert all(torch.equal(a, b) for a, b in zip(compiled(*inputs), mapped(*inputs), strict=True))


def test_the_second_derivative_is_refused_by_name():
    x, y = (x.requires_grad_() for x in make_inputs())
    (dx,) = torch.autograd.grad(loss(ours, x, y), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="toy has no second derivative"):
        dx.sum().backward()

    def slope(x):
        return torch.func.grad(lambda x: loss(ours, x, y))(x).sum()

    with pytest.raises(NotImplementedError, match="toy has no second derivative"):
        torch.func.grad(slope)(x)


def test_the_backward_pass_is_one_call_however_the_outputs_are_used():
    x, y = (x.requires_grad_() for x in make_inputs())
    product, _, _ = toy(x, y, None, 0.5)
    calls = dispatched(lambda: torch.autograd.grad(product, (x, y), torch.ones_like(product)))
    assert [name for name in calls if "detach" not in name] == ["aten.ones_like", "mixerlab.toy_backward"]


def test_both_passes_run_outside_of_autocast():
    inputs = [x.requires_grad_() for x in make_inputs()]
    AUTOCAST.clear()
    with torch.autocast("cpu", torch.bfloat16):
        loss(ours, *inputs).backward()
    assert AUTOCAST == [False, False]


def test_activation_checkpointing():
    inputs = [x.requires_grad_() for x in make_inputs()]
    kept = torch.autograd.grad(loss(ours, *inputs), inputs)
    again = torch.autograd.grad(checkpoint(loss, ours, *inputs, use_reentrant=False), inputs)
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))


def test_the_passes_are_registered_as_torch_expects():
    x, y = make_inputs()
    _, mean, _ = toy(x, y, HIDDEN, 0.5)
    torch.library.opcheck(torch.ops.mixerlab.toy_forward.default, (x, y, HIDDEN, 0.5))
    for dmean in (None, mean):
        torch.library.opcheck(torch.ops.mixerlab.toy_backward.default, (x, dmean, y, x, mean, HIDDEN, 0.5))
