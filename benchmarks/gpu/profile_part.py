"""Where the operator's time goes: by kernel, beside cuBLAS on its largest products, and without the host."""

from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from gpu.operator_part import feedback
from gpu.timing import Bench, Contestant, Part, Row, Sizes


def heading(bench: Bench) -> str:
    T, R = bench.sizes.profiled
    B, D = bench.sizes.batch(T), bench.sizes.width
    title = f"where the time goes, B = {B}, T = {T}, D = {D}, bf16; cuBLAS in panels of {R}"
    return f"{title}\n{'':>24} {'ms':>10} {'TFLOP/s':>8}"


def line(ms: float, flops: float) -> str:
    return f"{ms:>10.3f} {flops / ms / 1e9:>8.3g}"


def both(bench: Bench, graph: bool) -> str:
    """Forward and backward pass, with the host between the launches or as one CUDA graph."""
    T, _ = bench.sizes.profiled

    def make() -> Contestant:
        contestant = feedback(bench, T)

        def step() -> None:
            contestant.backward(contestant.forward())

        return bench.replayed(step) if graph else Contestant(step)

    flops = 7 * bench.sizes.batch(T) * T**2 * bench.sizes.width
    return line(bench.measure(make).milliseconds[0], flops)


def panel_products(bench: Bench, of_dq: bool) -> str:
    """cuBLAS on all panels of a pass: weights times the states before, or dlogits times keys into dq."""
    T, R = bench.sizes.profiled
    B, D = bench.sizes.batch(T), bench.sizes.width
    new = partial(torch.randn, device=bench.device, dtype=torch.bfloat16)
    out = torch.zeros(B, T, D, device=bench.device, dtype=torch.bfloat16)
    weights, values = new(B, T, R) if of_dq else new(B, R, T), new(B, T, D)

    def multiply() -> None:
        for lo in range(R, T, R):
            if of_dq:  # a panel of R columns, and the rows below them
                below = out[:, lo:]
                below.baddbmm_(weights[:, lo:], values[:, lo - R : lo])
            else:  # a panel of R rows, and the columns before them
                panel = out[:, lo : lo + R]
                panel.baddbmm_(weights[:, :, :lo], values[:, :lo])

    flops = sum(2 * B * R * lo * D for lo in range(R, T, R))
    return line(bench.measure(lambda: Contestant(multiply)).milliseconds[0], flops)


def by_kernel(bench: Bench) -> str:
    T, _ = bench.sizes.profiled
    contestant = feedback(bench, T)
    contestant.backward(contestant.forward())  # compiles
    bench.synchronize()
    activity = ProfilerActivity.CUDA if bench.on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as found:
        contestant.backward(contestant.forward())
        bench.synchronize()
    order = "self_device_time_total" if bench.on_gpu else "self_cpu_time_total"
    table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    return "one forward and one backward pass\n" + table


def rows(sizes: Sizes) -> list[Row]:
    return [
        Row(f"{'this operator':>24}", partial(both, graph=False)),
        Row(f"{'as a CUDA graph':>24}", partial(both, graph=True)),
        Row(f"{'baddbmm, product':>24}", partial(panel_products, of_dq=False)),
        Row(f"{'baddbmm, dq':>24}", partial(panel_products, of_dq=True)),
        Row(f"{'by kernel':>24}", by_kernel),
    ]


PART = Part(heading, rows, guess=5)
