"""The backends by kernels of flash-linear-attention. Their numbers are checked by fla_kernels.py, by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixerlab.kernels import fla
from mixerlab.kernels.gated_delta_rule import gated_delta_rule
from mixerlab.kernels.ssd import ssd

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_numbers_agree_on_a_gpu_or_else_in_the_interpreter():
    environment = os.environ | {"TRITON_F32_DEFAULT": "ieee"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    file = str(Path(__file__).with_name("fla_kernels.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", file]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stdout


def operands(*, dtype=torch.float32, width=4):
    x, gate = torch.zeros(1, 3, 1, 4, dtype=dtype), torch.zeros(1, 3, 1)
    key = torch.zeros(1, 3, 1, width, dtype=dtype)
    return {
        ssd: lambda **options: ssd(x, gate, torch.zeros(1), key, key, **options),
        gated_delta_rule: lambda **options: gated_delta_rule(key, key, x, gate, gate, **options),
    }


@pytest.mark.parametrize("operator", [ssd, gated_delta_rule])
def test_without_a_gpu_the_backend_is_refused_with_the_reason(operator):
    with pytest.raises(ValueError, match=r"'fla' cannot take this input: it is on device cpu.*chunked"):
        operands()[operator](backend="fla")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": torch.float64}, {}, "compute in float32, and an input is float64"),
        ({}, {}, "multiply float32 as TF32"),
        ({"dtype": torch.float16, "width": 257}, {}, "a head's state is 257 wide"),
        (
            {"dtype": torch.float16, "width": 5},
            {},
            r"a head's state is 4 x 5, .* even numbers in torch\.float16",
        ),
        ({"dtype": torch.float16}, {"chunk_size": 32}, "chunk_size is 32"),
        ({"dtype": torch.float16}, {}, "flash-linear-attention is not installed: pip install"),
    ],
)
@pytest.mark.parametrize("operator", [ssd, gated_delta_rule])
def test_what_it_cannot_take_is_refused_and_left_to_others(operator, change, options, message, monkeypatch):
    monkeypatch.setattr(fla, "why_not_triton", lambda x: None)
    monkeypatch.delenv("TRITON_F32_DEFAULT", raising=False)
    monkeypatch.setitem(sys.modules, "fla", None)
    fla._why_not_importable.cache_clear()
    run = operands(**change)[operator]
    with pytest.raises(ValueError, match=message):
        run(backend="fla", **options)
    run(**options)
    fla._why_not_importable.cache_clear()


@pytest.mark.parametrize("operator", [ssd, gated_delta_rule])
def test_transforms_do_without_it(operator, monkeypatch):
    monkeypatch.setattr(fla, "why_not_triton", lambda x: None)
    run = operands(dtype=torch.float16)[operator]
    assert torch.compile(lambda: run(), fullgraph=True, backend="eager")().shape == (1, 3, 1, 4)
    with pytest.raises(ValueError, match=r"no rules for torch\.func"):
        torch.func.vmap(lambda _: run(backend="fla"))(torch.zeros(2))


def test_documents_are_found_again_where_segments_change_in_place():
    segment_ids = torch.tensor([[0, 0, 1], [0, 1, 1]])
    assert fla.document_bounds(segment_ids).tolist() == [0, 2, 3, 4, 6]
    segment_ids.zero_()
    assert fla.document_bounds(segment_ids).tolist() == [0, 3, 6]
    with torch.inference_mode():
        assert fla.document_bounds(torch.tensor([[0, 1]])).tolist() == [0, 1, 2]
