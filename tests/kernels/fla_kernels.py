"""The backends by fla's kernels against the recurrences in float64, and ours against its naive one.

Gradients, states and packed documents are included.

On a GPU where there is one, else in Triton's interpreter; TRITON_F32_DEFAULT is ieee. Run by tests/kernels/test_fla.py.
"""

import os
from itertools import pairwise

import pytest
import torch
from torch.nn.functional import normalize

if os.environ.get("TRITON_INTERPRET") == "1":
    import fla_on_cpu  # noqa: F401  (before fla)
from mixerlab.kernels.gated_delta_rule import gated_delta_rule
from mixerlab.kernels.ssd import ssd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LOW = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # in the interpreter bf16 is not right
BATCH, TIME, HEADS, KEY, VALUE = 2, 70, 2, 6, 4  # two chunks, the second ragged
DOCUMENTS = torch.stack([torch.arange(TIME) // 66, 5 + (torch.arange(TIME) + 11) // 20]).to(DEVICE)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ssd_inputs():
    groups = [draw(BATCH, TIME, 1, KEY, seed=seed) for seed in (2, 3)]
    high = [draw(BATCH, TIME, HEADS, seed=4).sigmoid(), -draw(HEADS, seed=5).exp(), draw(HEADS, seed=6)]
    return [draw(BATCH, TIME, HEADS, VALUE), *groups], high


def run_ssd(low, high, **options):
    (x, B_in, C_out), (dt, A, D_skip) = low, high
    return ssd(x, dt, A, B_in, C_out, D_skip, **options)


def delta_rule_inputs():
    q, k = draw(BATCH, TIME, HEADS, KEY, seed=1), normalize(draw(BATCH, TIME, HEADS, KEY, seed=2), dim=-1)
    high = [-0.1 * draw(BATCH, TIME, HEADS, seed=3).exp(), draw(BATCH, TIME, HEADS, seed=4).sigmoid()]
    return [q, k, draw(BATCH, TIME, HEADS, VALUE)], high


def run_delta_rule(low, high, **options):
    return gated_delta_rule(*low, *high, **options)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("start", [False, True], ids=["from zeros", "from a state"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (LOW, 2e-2)])
@pytest.mark.parametrize(
    ("inputs", "run"), [(ssd_inputs, run_ssd), (delta_rule_inputs, run_delta_rule)], ids=["ssd", "delta rule"]
)
def test_equals_the_recurrence_with_all_gradients(inputs, run, dtype, tolerance, start, packed):
    results = []
    for backend, wide in (("fla", False), ("reference", True)):
        low, high = inputs()
        state = draw(BATCH, HEADS, VALUE, KEY, seed=8)
        # The first hold numbers that `dtype` can; the rest is float32.
        low = [x.to(dtype).to(DEVICE, torch.float64 if wide else dtype) for x in low]
        high = [x.float().to(DEVICE, torch.float64 if wide else torch.float32) for x in (*high, state)]
        leaves = [x.requires_grad_() for x in (*low, *(high if start else high[:-1]))]
        options = {"initial_state": high[-1] if start else None, "segment_ids": DOCUMENTS if packed else None}
        y, last = run(low, high[:-1], return_state=True, backend=backend, **options)
        loss = (y * draw(*y.shape, seed=9).to(y)).sum() + (last * draw(*last.shape, seed=10).to(last)).sum()
        results.append([y, last, *torch.autograd.grad(loss, leaves)])
        assert wide or (y.dtype, last.dtype) == (dtype, torch.float32)
    for i, (ours, theirs) in enumerate(zip(*results, strict=True)):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < tolerance, f"{i}: {error:.3g}"


def test_it_runs_by_name_alone(monkeypatch):
    import mixerlab.kernels.ssd as package

    def refuse(*_):
        raise AssertionError("chosen")

    monkeypatch.setattr(package, "ssd_fla", refuse)
    low, high = ([x.float() for x in part] for part in ssd_inputs())
    run_ssd(low, high)
    with pytest.raises(AssertionError, match="chosen"):
        run_ssd(low, high, backend="fla")


class Widened:
    """torch, whose float32 is float64: the naive reference casts to it."""

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_the_gated_delta_rule_is_flas_naive_one(backend, packed, monkeypatch):
    from fla.ops.gated_delta_rule import naive

    monkeypatch.setattr(naive, "torch", Widened())
    low, high = delta_rule_inputs()
    leaves = [x.requires_grad_() for x in (*low, *high, draw(BATCH, HEADS, VALUE, KEY, seed=8))]
    *arguments, state = leaves
    ids = DOCUMENTS.cpu() if packed else torch.zeros(BATCH, TIME, dtype=torch.int64)

    def theirs():
        rows = []
        for row, first in enumerate(state):
            memory, pieces = first.mT[None], []
            for start, stop in pairwise([0, *(ids[row].diff().nonzero() + 1).flatten().tolist(), TIME]):
                memory = memory if start == 0 else torch.zeros_like(memory)
                q, k, v, log_decay, beta = (x[row : row + 1, start:stop] for x in arguments)
                y, memory = naive.naive_recurrent_gated_delta_rule(
                    q, k, v, beta, log_decay, scale=1.0, initial_state=memory, output_final_state=True
                )
                pieces.append(y[0])
            rows.append((torch.cat(pieces), memory[0].mT))
        return tuple(torch.stack(part) for part in zip(*rows, strict=True))

    ours = gated_delta_rule(
        *arguments, initial_state=state, segment_ids=ids, return_state=True, backend=backend
    )
    results = []
    for y, last in (ours, theirs()):
        assert y.dtype == torch.float64
        loss = (y * draw(*y.shape, seed=9)).sum() + (last * draw(*last.shape, seed=10)).sum()
        results.append(([y, last], torch.autograd.grad(loss, leaves)))
    (mine, gradients), (published, expected) = results
    for a, b in zip(mine, published, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
