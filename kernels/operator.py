"""Operators with a hand-written gradient: what they need so that autograd, torch.func and torch.compile take them."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def opaque(name: str, function: Callable, fake: Callable) -> Callable:
    """`function` as torch's operator mixerlab::`name`, which torch.compile and torch.func call and do not trace.

    It runs outside of autocast, and has no gradient.

    Args:
        name: of the operator.
        function: takes tensors with the batch first, and other values; its parameters are annotated. Returns new
            tensors with the batch first, in a tuple. Rows of a batch are independent: torch.vmap adds to the batch.
        fake: takes the same, and returns tensors of the shapes, strides and dtypes that `function` would.
    """

    @wraps(function)  # for the annotations, which become the operator's schema
    def without_autocast(*arguments):
        device = next(x.device.type for x in arguments if isinstance(x, Tensor))
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    def fold(info, dims, *arguments):
        """Folds the mapped dimension of size V into the batch: (V, B, ...) -> (V * B, ...)."""

        def folded(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.flatten(0, 1)

        outputs = op(*map(folded, arguments, dims))
        return tuple(x.unflatten(0, (info.batch_size, -1)) for x in outputs), (0,) * len(outputs)

    registered = torch.library.custom_op(f"mixerlab::{name}", without_autocast, mutates_args=())
    registered.register_fake(fake)
    registered.register_vmap(fold)
    op = getattr(torch.ops.mixerlab, name)  # torch.compile would have to find the other in a module
    return op


def operator(
    name: str,
    forward: Callable,
    backward: Callable,
    *,
    outputs: tuple[str, ...],
    forward_fake: Callable,
    backward_fake: Callable,
) -> Callable[..., tuple[Tensor, ...]]:
    """`forward`, with the gradient that `backward` computes. Differentiable once; each pass is `opaque`.

    Args:
        name: the passes are mixerlab::`name`_forward and mixerlab::`name`_backward.
        forward: as for `opaque`.
        backward: returns the gradients of the first arguments of `forward`, as many as there are. What it takes goes by
            name: an argument or output of `forward`, which is then kept for it, or, as d and the name of an output, the
            gradient of that output, None where nothing depends on it. Other outputs carry no gradient.
        outputs: names of what `forward` returns.
        forward_fake, backward_fake: as for `opaque`.
    """
    opaque(f"{name}_forward", forward, forward_fake)
    opaque(f"{name}_backward", backward, backward_fake)
    arguments = tuple(inspect.signature(forward).parameters)
    taken = tuple(inspect.signature(backward).parameters)

    def keep(ctx, inputs, output):
        values = dict(zip(arguments + outputs, (*inputs, *output), strict=True))
        kept = [values[arg] for arg in taken if arg in values]
        ctx.mark_non_differentiable(*(values[out] for out in outputs if f"d{out}" not in taken))
        ctx.set_materialize_grads(False)  # they would be zeros for every output
        ctx.save_for_backward(*(x for x in kept if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in kept]

    def differentiate(ctx, *gradients):
        if all(gradient is None for gradient in gradients):
            return (None,) * len(arguments)
        saved = iter(ctx.saved_tensors)  # read once: activation checkpointing frees them as they are read
        kept = iter([x[0] if x else next(saved) for x in ctx.others])
        values = {f"d{out}": gradient for out, gradient in zip(outputs, gradients, strict=True)}
        found = backward_pass(*(values[arg] if arg in values else next(kept) for arg in taken))
        return *found, *(None,) * (len(arguments) - len(found))

    def refuse(ctx, *gradients):
        raise NotImplementedError(f"{name} has no second derivative; use backend='reference'")

    backward_pass = _differentiable(f"{name}_backward", lambda ctx, inputs, output: None, refuse)
    return _differentiable(f"{name}_forward", keep, differentiate)


def _differentiable(name: str, keep: Callable, differentiate: Callable) -> Callable:
    """mixerlab::`name` with a gradient: `keep` and `differentiate` are a torch.autograd.Function's setup_context and
    backward."""
    op = getattr(torch.ops.mixerlab, name)
    torch.library.register_autograd(f"mixerlab::{name}", differentiate, setup_context=keep)

    class Function(torch.autograd.Function):
        generate_vmap_rule = True
        forward = staticmethod(op.__call__)
        setup_context = staticmethod(keep)
        backward = staticmethod(differentiate)

    def run(*inputs):
        # torch.func has no rules for a gradient that is registered, and torch.compile none for a function made here.
        if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
            return op(*inputs)
        return Function.apply(*inputs)

    return run
