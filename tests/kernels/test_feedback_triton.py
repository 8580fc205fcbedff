"""The Triton kernels of feedback attention. Their numbers are checked by feedback_kernels.py, in a process of its own.

Letters: B batch, H heads, T new positions, L past positions, K key width, P value width.
"""

import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ahead_of_time import compile_launch, distinct, leave_out, record
from dispatched import dispatched
from measure import peak_bytes
from mixerlab.kernels import backend
from mixerlab.kernels.feedback import feedback_attention

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_numbers_agree_on_a_gpu_or_else_in_the_interpreter():
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    file = str(Path(__file__).with_name("feedback_kernels.py"))
    # The interpreter runs on one core: two processes take about half the time.
    runs = [
        subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-x", file, "-k", part],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in ("textbook", "not textbook")
    ]
    reports = [run.communicate()[0] for run in runs]
    print(*reports)  # what was skipped, and why
    assert not any(run.returncode for run in runs), "".join(reports)


def test_without_a_gpu_the_backend_is_refused_with_the_reason():
    x, gamma = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 3)
    with pytest.raises(ValueError, match=r"'triton' cannot take this input: it is on device cpu.*chunked"):
        feedback_attention(x, x, x, gamma, backend="triton")


# ---- what is launched ----


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with the launches of what runs in the test, on the CPU."""
    pytest.importorskip("triton")
    from mixerlab.kernels.feedback import triton as kernels

    monkeypatch.setattr(backend, "INTERPRETED", True)
    return record(kernels, monkeypatch)


def forward_and_backward(T, width=16, *, B=1, L=0, segments=False, dtype=torch.bfloat16, chunk_size=None):
    q, k, f = (torch.zeros(B, 1, T, width, dtype=dtype, requires_grad=True) for _ in range(3))
    gamma = torch.zeros(B, 1, T, requires_grad=True)
    past = (q.new_zeros(B, 1, L, width), q.new_zeros(B, 1, L, width)) if L else None
    ids = torch.zeros(B, T, dtype=torch.int64) if segments else None
    s = feedback_attention(
        q, k, f, gamma, past=past, segment_ids=ids, chunk_size=chunk_size, backend="triton"
    )
    s.sum().backward()


def test_memory_grows_linearly_and_the_panel_size_bounds_it(launches, tmp_path):
    def peak(T, chunk_size=None):
        return peak_bytes(lambda: forward_and_backward(T, chunk_size=chunk_size), tmp_path)

    assert peak(16384) < 2.02 * peak(8192) < 2.02**2 * peak(4096)
    assert peak(16384) < 16384 * 16384 * 2 / 10
    panel = 16384 * 2  # bytes of one row of a panel
    assert peak(16384, 512) - peak(16384, 128) > 0.9 * (512 - 128) * panel
    assert launches


def test_panels_shrink_where_many_sequences_would_make_them_large(launches):
    forward_and_backward(2048, B=200)
    sizes = {launch.arguments["weights"].nbytes for launch in launches}
    assert max(sizes) <= 256 * 2**20


@pytest.mark.parametrize(
    ("B", "T", "width"), [(8, 4096, 1024), (5, 4096, 1024), (1, 65536, 1024), (2, 16384, 512)]
)
def test_programs_keep_a_gpu_busy_however_few_and_long_the_sequences(B, T, width, launches):
    forward_and_backward(T, width, B=B)
    for transposed in (False, True):
        programs = [
            math.prod(launch.grid)
            for launch in launches
            if launch.name == "product_kernel"
            and launch.arguments["TRANSPOSED"] == transposed
            and not launch.arguments["ADD"]
        ]
        assert max(programs) < 512
        # Beside where the sums are short: at the beginning forward, at the end backward.
        assert statistics.median(programs) >= 256


def traffic(launches, T, tmp_path) -> list[int]:
    """A row of the table in docs/sessa-kernel.md, in the order of its columns."""
    from mixerlab.kernels.feedback import triton as kernels

    with pytest.MonkeyPatch.context() as patch:
        leave_out(kernels, patch)
        peak = peak_bytes(lambda: forward_and_backward(T, 1024), tmp_path) - 3 * T * 1024 * 2  # the inputs
    forward_and_backward(T, 1024)
    names = []
    weights = dq = 0
    for launch in launches:
        names.append(launch.name)
        given = launch.arguments
        if launch.name in ("weights_kernel", "dlogits_kernel"):
            columns, rows, N = launch.grid
            reached = [
                (column, row)
                for column in range(columns)
                for row in range(rows)
                if given["first_column"] + column * given["TILE"] < given["lo"] + (row + 1) * given["TILE"]
            ]
            weights += N * len(reached) * given["TILE"] ** 2 * given["weights"].itemsize
        elif given.get("ADD"):
            dq += (2 * given["n_out"] - given["fresh"]) * given["W"] * given["out"].itemsize
    forward = names.index("transposed_solve_kernel") - 1
    return [T, forward, len(names) - forward, *(round(x / 2**20) for x in (peak, weights, dq))]


@pytest.mark.parametrize("T", [512, 1024, 4096, 65536])
def test_launches_and_bytes_are_those_of_the_documentation(T, launches, tmp_path):
    page = (ROOT / "docs" / "sessa-kernel.md").read_text(encoding="utf-8")
    rows = [
        [int(x) for x in row.split("|")] for row in re.findall(r"^ +\| (\d[\d |]*\d) \|$", page, flags=re.M)
    ]
    assert traffic(launches, T, tmp_path) in rows


@pytest.mark.parametrize("panels", [1, 2, 4])
def test_dq_moves_less_and_weights_take_more_where_panels_share_it(panels, launches, monkeypatch, tmp_path):
    from mixerlab.kernels.feedback.triton import tiles

    def measured(panels):
        monkeypatch.setattr(tiles, "DQ_PANELS", panels)
        launches.clear()
        _, _, _, _, weights, dq = traffic(launches, 4096, tmp_path)
        return weights, dq, max(launch.arguments["weights"].shape[2] for launch in launches[-4:])

    (weights_1, dq_1, width_1), (weights, dq, width) = measured(1), measured(panels)
    assert weights == weights_1
    assert width == panels * width_1
    assert dq == dq_1 / panels


def test_more_sequences_than_a_launch_takes_are_refused_in_one_line(launches):
    q = torch.zeros(3, 32768, 1, 2, 16, dtype=torch.bfloat16)
    gamma = torch.zeros(3, 32768, 1, 2)
    with pytest.raises(ValueError, match=r"98304 sequences times heads.*65535.*chunk_size"):
        torch.vmap(lambda x, g: feedback_attention(x, x, x, g, backend="triton"))(q, gamma)


def test_shares_of_a_sum_are_rounded_once():
    pytest.importorskip("triton")
    from mixerlab.kernels.feedback.triton import _add_up

    def product(x, out, splits):
        for share, value in zip(out, (1 + 2**-9, -1.0), strict=True):
            share.fill_(value)

    out = torch.empty(1, 1, 4, 8, dtype=torch.bfloat16)
    _add_up(product, torch.empty(2 * out.numel()), 2, out, out)
    assert (out == 2**-9).all()


def test_views_into_one_projection_are_read_in_place(launches):
    projection = torch.zeros(2, 300, 2, 3, 16, dtype=torch.bfloat16, requires_grad=True)  # (B, T, 2, H, K)
    q, k = (x.transpose(1, 2) for x in projection.unbind(2))
    f, gamma = torch.zeros(2, 3, 300, 16, dtype=torch.bfloat16), torch.zeros(2, 3, 300)
    feedback_attention(q, k, f, gamma, backend="triton").sum().backward()
    for launch in launches:
        if launch.name == "weights_kernel":  # of both passes
            assert launch.arguments["q"].data_ptr() == q.data_ptr()
            assert launch.arguments["k"].data_ptr() == k.data_ptr()
            assert launch.arguments["q_t"] == 2 * 3 * 16
    assert {"weights_kernel", "dlogits_kernel"} <= {launch.name for launch in launches}


def test_views_that_the_kernels_cannot_read_are_copied():
    pytest.importorskip("triton")
    from mixerlab.kernels.feedback.triton.tiles import readable

    x = torch.empty(2, 3, 300, 32, device="meta")
    far = torch.empty_strided((1, 1, 300, 32), (2**32, 2**32, 2**23, 1), device="meta")
    assert readable(x.transpose(0, 2)).stride() == x.transpose(0, 2).stride()
    for other in (x[..., ::2], far):  # numbers apart, and offsets of more than 32 bits
        assert readable(other).is_contiguous()


def test_a_new_length_compiles_nothing(launches):
    def compiled(T, **options):
        launches.clear()
        forward_and_backward(T, **options)
        return {repr(launch.compiled_in()) for launch in launches}

    assert len(compiled(2048)) == 9
    assert compiled(2048) == compiled(2049) == compiled(3333)
    assert compiled(300) == compiled(1024)
    assert compiled(300, L=1) == compiled(600, L=129)


def test_autograd_adds_nothing_to_the_backward_pass(launches):
    calls = dispatched(lambda: forward_and_backward(300))
    after = set(calls[calls.index("mixerlab.feedback_triton_backward") + 1 :])
    # A gradient that the record of launches holds is copied to its leaf.
    assert after <= {"aten.detach", "aten.new_empty_strided", "aten.copy_"}


# ---- ahead of time ----


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "width"),
    [
        *((torch.bfloat16, width) for width in (16, 32, 64, 100, 1024)),
        (torch.float16, 1024),
        *((torch.float32, width) for width in (16, 32, 100, 1024)),
    ],
    ids=str,
)
def test_compiles_ahead_of_time_without_spills(dtype, width, architecture, launches, monkeypatch, tmp_path):
    forward_and_backward(600, width, dtype=dtype, segments=True)
    if width == 100:
        forward_and_backward(600, width, dtype=dtype)
        forward_and_backward(600, width, dtype=dtype, L=300)
    assert_compiles(launches, dtype, width, architecture, monkeypatch, tmp_path)


@pytest.mark.slow
def test_what_an_h100_may_choose_compiles_too(launches, monkeypatch, tmp_path):
    from mixerlab.kernels.feedback.triton import tiles

    monkeypatch.setattr(tiles, "HALF", tiles.WIDE)
    monkeypatch.setattr(tiles, "DQ_PANELS", 2)
    forward_and_backward(600, 1024, segments=True)
    assert_compiles(launches, torch.bfloat16, 1024, 90, monkeypatch, tmp_path)


def assert_compiles(launches, dtype, width, architecture, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    matrix_units = False
    for launch in distinct(launches):
        binary = compile_launch(launch, architecture, tmp_path)
        assert binary.spilled == 0, f"{binary.spilled} bytes of registers spill: {launch.compiled_in()}"
        limit = {80: 163, 90: 227}[architecture] * 1024
        assert binary.shared <= limit, f"{binary.shared} bytes of shared memory: {launch.compiled_in()}"
        matrix_units |= "wgmma" in binary.ptx
        if width % 16 == 0 and dtype != torch.float32:
            assert "ld.global.b16" not in binary.ptx, f"loads of single numbers: {launch.compiled_in()}"
    assert len({launch.name for launch in launches}) == 6
    if architecture == 90 and dtype != torch.float32:
        assert matrix_units
