"""The Triton kernels' errors where roundings add up, by feedback_accuracy.py in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["not slow", "slow"])  # which run beside each other
def test_errors_on_a_gpu_or_else_in_the_interpreter(part):
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported
    file = str(Path(__file__).with_name("feedback_accuracy.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", file, "-m", part],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 0, run.stdout
