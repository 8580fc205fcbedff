"""The contract of a mixer as checks that anyone can run on theirs.

    from mixerlab.mixers.testing import check_mixer
    check_mixer(lambda d_model: build_mixer("mine", d_model))

Letters: B batch, T time, D model width.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mixerlab.kernels.backend import use_backend
from mixerlab.mixers.mixer import Mixer, State

Factory = Callable[[int], Mixer]
"""d_model -> a mixer of that width."""

D, B, T = 32, 2, 21


def check_mixer(factory: Factory) -> None:
    """Runs every check below on the mixer that `factory` builds; AssertionError names the first that fails."""
    for check in CHECKS:
        try:
            check(factory)
        except AssertionError as error:
            raise AssertionError(f"{check.__name__}: {check.__doc__}\n{error}") from error


def prepared(factory: Factory, d_model: int = D) -> Mixer:
    """The mixer in evaluation mode, the same at each call, its parameters far from special values.

    It has the dtype of its contract, and is on a GPU where it needs one and there is one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        mixer = factory(d_model)
        mixer = mixer.to(mixer.contract.dtype).eval()
        for parameter in mixer.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return mixer.to("cuda" if mixer.contract.needs_triton and torch.cuda.is_available() else "cpu")


def double(factory: Factory, d_model: int = D) -> Mixer:
    """As `prepared`, in float64."""
    return prepared(factory, d_model).double()


def inputs(batch: int = B, time: int = T, d_model: int = D, seed: int = 0) -> Tensor:
    return torch.randn(
        batch, time, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def inputs_of(mixer: Mixer, **sizes: int) -> Tensor:
    """`inputs`, where the prepared mixer is and in its dtype."""
    return inputs(**sizes).to(next(mixer.parameters(), torch.zeros(())).device, mixer.contract.dtype)


def empty_state(mixer: Mixer, x: Tensor, batch_size: int = B, max_len: int = T) -> State:
    return mixer.init_state(batch_size, max_len, x.device, x.dtype)


def assert_agree(mixer: Mixer, actual: Tensor, expected: Tensor) -> None:
    """To the tolerance of the mixer's contract."""
    tolerance = mixer.contract.tolerance
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def check_initialisation(factory: Factory) -> None:
    """`reset_parameters` draws every parameter of the mixer's own, from the global generator alone."""
    drawn = []
    for _ in range(2):
        mixer = factory(D)
        own = dict(mixer.named_parameters(recurse=False))
        for parameter in own.values():
            parameter.data.fill_(float("nan"))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            mixer.reset_parameters()
        drawn.append(own)
    for name, parameter in drawn[0].items():
        assert torch.isfinite(parameter).all(), f"{name} is not drawn"
        assert torch.equal(parameter, drawn[1][name]), f"{name} differs from draw to draw"


def check_named_parameters(factory: Factory) -> None:
    """`no_decay` and `keep_float32` name the mixer's own parameters; one that is None, as a missing bias, will do."""
    for module in factory(D).modules():
        for attribute in ("no_decay", "keep_float32"):
            names = set(getattr(module, attribute, ()))
            unknown = names - module._parameters.keys()
            assert not unknown, f"{attribute} of {type(module).__name__} names no parameter: {unknown}"


def check_shape(factory: Factory) -> None:
    """(B, T, D) goes to (B, T, D), finite, for T = 1 too."""
    mixer = prepared(factory)
    for time in (1, 2, T):
        x = inputs_of(mixer, time=time)
        y = mixer(x)
        assert y.shape == x.shape, f"T = {time}: {tuple(y.shape)}"
        assert torch.isfinite(y).all()


def check_causality(factory: Factory) -> None:
    """Changing token t leaves earlier outputs as they were, and their gradient with respect to it is exactly 0."""
    mixer = prepared(factory)
    tolerance = mixer.contract.tolerance / 100
    for t in (1, 10, T - 1):
        x = inputs_of(mixer).requires_grad_()
        y = mixer(x)
        changed = x.detach().clone()
        changed[:, t] += 3
        torch.testing.assert_close(mixer(changed)[:, :t], y[:, :t], rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(y[:, :t].square().sum(), x)
        assert (gradient[:, t:] == 0).all(), f"outputs before {t} have a gradient from it"


def check_extend_equals_forward(factory: Factory) -> None:
    """However a sequence is cut, the outputs of `extend` put together equal `forward`, to the contract's tolerance."""
    mixer = prepared(factory)
    x = inputs_of(mixer)
    whole = mixer(x)
    cuts = random.Random(0)
    with torch.no_grad():
        for trial in range(6):
            places = sorted({0, T, *cuts.sample(range(1, T), k=(0, 1, 2, 5, 9, T - 1)[trial])})
            state = empty_state(mixer, x)
            pieces = []
            for start, stop in pairwise(places):
                y, state = mixer.extend(x[:, start:stop], state)
                pieces.append(y)
            assert_agree(mixer, torch.cat(pieces, dim=1), whole)
            assert state.length.tolist() == [T] * B
            assert state.longest == T, "extend returns state.advanced(T, ...), which counts `longest` too"


def check_ragged_rows(factory: Factory) -> None:
    """Prompts of different lengths, prefilled apart and put together, go on like each alone; clones are apart."""
    mixer = prepared(factory)
    x = inputs_of(mixer)
    lengths = (3, 9)
    with torch.no_grad():
        states: list[State] = []
        for row, length in enumerate(lengths):
            states.append(mixer.extend(x[row : row + 1, :length], empty_state(mixer, x, 1))[1])
        together = type(states[0]).cat(states)
        branch = together.clone()
        new = inputs_of(mixer, time=4, seed=1)
        y, together = mixer.extend(new, together)
        mixer.extend(-new[:, :2], branch.clone())
        again, _ = mixer.extend(new, branch)
        torch.testing.assert_close(again, y)
        for row, length in enumerate(lengths):
            alone = mixer(torch.cat((x[row, :length], new[row]))[None])
            assert_agree(mixer, y[row : row + 1], alone[:, length:])
        assert together.length.tolist() == [length + 4 for length in lengths]
        assert together.longest == max(lengths) + 4


def check_longest_is_a_bound(factory: Factory) -> None:
    """A State whose `longest` is more than its lengths goes on alike, and takes up what `extend` returns in place."""
    mixer = prepared(factory)
    x = inputs_of(mixer, time=8)
    with torch.no_grad():
        _, state = mixer.extend(x[:, :5], empty_state(mixer, x))
        fixed = state.clone().bounded(T - 1)
        for t in range(5, 8):
            y, state = mixer.extend(x[:, t : t + 1], state)
            again, after = mixer.extend(x[:, t : t + 1], fixed)
            fixed.assign(after)
            assert_agree(mixer, again, y)


def check_full_state_raises(factory: Factory) -> None:
    """Going past `max_len` raises ValueError."""
    mixer = prepared(factory)
    x = inputs_of(mixer, time=5)
    with torch.no_grad():
        _, state = mixer.extend(x, empty_state(mixer, x, max_len=6))
        try:
            mixer.extend(x[:, :2], state)
        except ValueError:
            return
    raise AssertionError("7 positions fit into a state of max_len 6")


def check_segments(factory: Factory) -> None:
    """Packed documents equal the same documents run apart, gradients too, to its tolerance; or are refused."""
    mixer = prepared(factory)
    x = inputs_of(mixer).requires_grad_()
    lengths = [[5, 1, T - 6], [1, 1, 2, T - 4]]
    segment_ids = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    ).to(x.device)
    if not mixer.supports_segments:
        try:
            mixer(x, segment_ids)
        except ValueError:
            return
        raise AssertionError("supports_segments is False, and segment_ids are not refused")
    cotangent = inputs_of(mixer, seed=2)
    wanted = (x, *mixer.parameters())
    packed = mixer(x, segment_ids)
    packed_gradients = torch.autograd.grad((packed * cotangent).sum(), wanted, allow_unused=True)
    apart = torch.stack(
        [
            torch.cat([mixer(piece[None])[0] for piece in row.split(length)])
            for row, length in zip(x, lengths, strict=True)
        ]
    )
    assert_agree(mixer, packed, apart)
    apart_gradients = torch.autograd.grad((apart * cotangent).sum(), wanted, allow_unused=True)
    pairs: list[tuple[Tensor | None, Tensor | None]]
    pairs = list(zip(packed_gradients, apart_gradients, strict=True))
    for ours, theirs in pairs:
        if ours is not None or theirs is not None:
            assert ours is not None
            assert theirs is not None
            assert_agree(mixer, ours, theirs)


def check_gradients(factory: Factory) -> None:
    """Gradients agree with finite differences, for the input and every parameter but `surrogate` ones."""
    mixer = prepared(factory, d_model=8)
    surrogate = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in mixer.named_modules()  # mixers inside the mixer too
        for name in getattr(module, "surrogate", ())
    }
    everything = dict(mixer.named_parameters())
    assert surrogate <= set(everything), f"surrogate names no parameter: {surrogate - set(everything)}"
    names = [name for name in everything if name not in surrogate]
    parameters = tuple(everything[name].detach().clone().requires_grad_() for name in names)

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,))

    x = inputs_of(mixer, batch=1, time=5, d_model=8).requires_grad_()
    if x.dtype == torch.float64:
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)
    else:
        _check_along_one_direction(run, (x, *parameters))


def _check_along_one_direction(run: Callable[..., Tensor], arguments: tuple[Tensor, ...]) -> None:
    """A central difference with a step that float32 can resolve, each argument moved by as much as it is large."""
    generator = torch.Generator().manual_seed(3)
    step = 2e-3
    with torch.no_grad():
        moves = [
            torch.randn(a.shape, generator=generator).to(a) * a.square().mean().sqrt() for a in arguments
        ]
        ahead, behind = (
            run(*(a + sign * step * move for a, move in zip(arguments, moves, strict=True)))
            for sign in (1, -1)
        )
    y = run(*arguments)
    cotangent = torch.randn(y.shape, generator=generator).to(y)
    gradients = torch.autograd.grad(y, arguments, cotangent)
    parts = torch.stack([(g * move).sum() for g, move in zip(gradients, moves, strict=True)])
    expected = ((ahead - behind) * cotangent).sum() / (2 * step)
    error = (parts.sum() - expected).abs() / parts.norm()
    assert error < 0.01, f"relative error {error:.3g}"


def check_autocast(factory: Factory) -> None:
    """Under bf16 autocast the output is near the exact one, and gradients are finite and reach everything."""
    exact = prepared(factory)
    mixer = prepared(factory).float()
    x = inputs_of(mixer).float().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = mixer(x)
    reference = exact(x.to(exact.contract.dtype))
    error = (y.to(reference.dtype) - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    assert error < 0.05, f"relative error {error:.3g}"
    y.float().square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"


def check_compile(factory: Factory) -> None:
    """torch.compile makes one graph of it (or more), at two lengths, with the same output and gradient."""
    torch._dynamo.reset()
    mixer = prepared(factory)
    compiled = torch.compile(mixer, fullgraph=mixer.contract.one_graph, backend="aot_eager")
    for time in (16, 23):
        x = inputs_of(mixer, time=time).requires_grad_()
        y, expected = compiled(x), mixer(x)
        torch.testing.assert_close(y, expected)
        (ours,) = torch.autograd.grad(y.square().sum(), x)
        (theirs,) = torch.autograd.grad(expected.square().sum(), x)
        torch.testing.assert_close(ours, theirs)


def check_state_dict(factory: Factory) -> None:
    """Loading a state dict into a fresh mixer gives the same outputs."""
    mixer = prepared(factory)
    x = inputs_of(mixer)
    fresh = factory(D).to(x.device, x.dtype).eval()
    fresh.load_state_dict(mixer.state_dict())
    assert torch.equal(fresh(x), mixer(x))


def check_flops(factory: Factory) -> None:
    """`flops` agrees within 2% with torch's counter on the matrix-product form, causal ones halved; or is a formula."""
    mixer = factory(64).eval()
    if not mixer.contract.counted_flops:
        return

    def count(time: int) -> int:
        # The forms without kernels are counted; a triangular solve, which the counter does not know, as a product.
        def solve(a: torch.Size, b: torch.Size, *_, out_shape=None, **__) -> int:
            return 2 * b.numel() * a[-1]

        counter = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.linalg_solve_triangular: solve}
        )
        with counter, sdpa_kernel(SDPBackend.MATH), use_backend("reference"), torch.no_grad():
            mixer(torch.zeros(1, time, 64))
        return counter.get_total_flops()

    # Of a t + b t^2 the square is T x T products, of which causality needs half.
    short, long = 256, 512
    square = (count(long) - 2 * count(short)) / (long**2 - 2 * short**2)
    linear = (count(short) - square * short**2) / short
    for time in (short, long, 2048):
        expected = linear * time + square * time**2 / 2
        assert abs(mixer.flops(time) - expected) <= 0.02 * expected, f"{mixer.flops(time)} != {expected}"


def check_fixed_routing(factory: Factory) -> None:
    """`mix_fixed`, unless None: linear in the values, causal, each document and row alone, and 0 without a gradient."""
    mixer = double(factory, d_model=8)
    time = 9
    x = inputs(time=time, d_model=8)
    every = torch.eye(time, dtype=x.dtype).expand(B, -1, -1)
    influence = mixer.mix_fixed(x, every)
    if influence is None:
        return
    assert influence.ndim == 4, f"{tuple(influence.shape)}: expected (B, H, T, C)"
    assert influence.shape == (B, influence.shape[1], time, time), f"{tuple(influence.shape)}"
    values = inputs(time=time, d_model=3, seed=1)
    torch.testing.assert_close(mixer.mix_fixed(x, values), influence @ values[:, None])
    begun = mixer.mix_fixed(x[:1, :5], every[:1, :5, :5])
    torch.testing.assert_close(begun, influence[:1, :, :5, :5], msg="it sees later positions, or other rows")
    for name, value in mixer.routing(x).items():
        assert value.shape[0] == B, f"routing {name}: {tuple(value.shape)}"
        assert value.shape[2:] in ((time,), (time, time)), f"routing {name}: {tuple(value.shape)}"
    for ids in (None, torch.tensor([[0] * 4 + [1] * 5])) if mixer.supports_segments else (None,):
        influence = mixer.mix_fixed(x[:1], every[:1], ids)
        assert influence is not None
        gradient = torch.autograd.functional.jacobian(lambda y, ids=ids: mixer(y, ids), x[:1])
        unconnected = gradient[0, :, :, 0].abs().amax((1, 3)) == 0  # (T, T)
        assert (influence[0, :, unconnected] == 0).all(), "influence where the output has no gradient"
        if ids is not None:
            second = mixer.mix_fixed(x[:1, 4:], every[:1, 4:, 4:])
            torch.testing.assert_close(influence[:, :, 4:, 4:], second)


def check_state_bytes(factory: Factory) -> None:
    """`state_bytes` is what the tensors of a State take."""
    mixer = factory(D)
    for length in (1, 10, 100):
        for dtype in (torch.float32, torch.bfloat16):
            actual = mixer.init_state(1, length, dtype=dtype).nbytes()
            assert mixer.state_bytes(length, dtype) == actual, f"length {length}, {dtype}: {actual}"


CHECKS = (
    check_initialisation,
    check_named_parameters,
    check_shape,
    check_causality,
    check_extend_equals_forward,
    check_ragged_rows,
    check_longest_is_a_bound,
    check_full_state_raises,
    check_segments,
    check_gradients,
    check_autocast,
    check_compile,
    check_state_dict,
    check_flops,
    check_state_bytes,
    check_fixed_routing,
)
