"""Benchmarks: each starts, those that can run at sizes that say nothing, and the trial of reliability in small."""

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from tiny_runs import ROOT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
SCRIPT = ROOT / "benchmarks" / "feedback_gpu.py"


def run(monkeypatch, *arguments, script=SCRIPT):
    monkeypatch.setattr("sys.argv", [f"benchmarks/{script.name}", *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_benchmark_says_how_it_is_run(script, monkeypatch, capsys):
    with pytest.raises(SystemExit) as left:
        run(monkeypatch, "--help", script=script)
    assert left.value.code == 0
    assert f"usage: {script.name}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", "fsdp"])
def test_a_run_that_is_killed_again_and_again_goes_on_as_if_nothing_had_happened(strategy):
    reliability = runpy.run_path(str(ROOT / "benchmarks" / "reliability.py"))
    counts = ["--kills", "3", "--restarts", "1", "--ends", "3", "--full-disks", "0"]
    arguments = [*counts, "--strategies", strategy, "--seed", "1"]
    assert reliability["main"](arguments) == 0


def test_every_table_of_the_gpu_benchmark_is_printed(monkeypatch, capfd):
    pytest.importorskip("triton")
    run(monkeypatch, "--smoke", "--lengths", "16", "24")
    heading, *tables = capfd.readouterr().out.split("\n\n")
    assert f"torch {torch.__version__}" in heading
    assert "\npython benchmarks/feedback_gpu.py --smoke --lengths 16 24\n" in heading
    titles = ["where the time goes", "feedback attention", "decoding one position", "a training step"]
    rows = [5, 8 * 2, 3, 3]
    for table, title, n_rows in zip(tables, titles, rows, strict=True):
        first, _, *lines = table.strip().splitlines()
        assert title in first
        assert re.fullmatch(r"\w+: \d+ s", lines.pop()), "how long the part took"
        timed = [line for line in lines if re.search(r" \d+\.\d s$", line)]
        assert len(timed) == n_rows
        wrong = [line for line in lines if re.search("failed|out of memory|nan", line)]
        assert all("attention (" in line for line in wrong), (
            wrong
        )  # not every backend of torch is on every machine


BARE = """
import sys

class Bare:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing}:
            raise ImportError(f"{{name}} is not on this machine")

sys.meta_path.insert(0, Bare())
"""


def test_a_machine_with_torch_and_triton_alone_measures_all_but_training(tmp_path):
    pytest.importorskip("triton")
    missing = ["omegaconf", "lightning", "datasets", "tokenizers", "torchmetrics", "tensorboard", "xxhash"]
    (tmp_path / "sitecustomize.py").write_text(BARE.format(missing=missing))
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT / "src")]))

    def python(*arguments):
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    assert python("-c", "import omegaconf").returncode != 0
    root = python("-c", "import mixerlab, mixerlab.kernels")
    assert root.returncode == 0, root.stderr
    parts = ["--parts", "profile", "operator", "decoding", "--lengths", "16"]
    done = python("benchmarks/feedback_gpu.py", "--smoke", *parts)
    assert done.returncode == 0, done.stderr
    assert re.findall("^(\\w+): \\d+ s$", done.stdout, re.M) == ["profile", "operator", "decoding"]
    failed = [line for line in done.stdout.splitlines() if "failed" in line and "attention (" not in line]
    assert failed == []


DYING = """
import os, time
import torch
from gpu.timing import SMOKE, Contestant, Part, Row, run_all

def fits(bench):
    bench.measure(lambda: Contestant(lambda: None))
    return "measured"

def too_large(bench):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\\nMore lines.")

def broken(bench):
    raise RuntimeError("No available kernel.\\nMore lines.")

def kills(bench):
    os._exit(7)

def heading(bench):
    return "heading"

def rows(sizes):
    return [Row(f.__name__, f) for f in (fits, too_large, broken, kills, fits, kills)]

if __name__ == "__main__":
    part = Part(heading, rows, 0.0)
    run_all([("first", part), ("second", part)], "cpu", SMOKE, 0.0)
"""


def test_a_row_that_dies_takes_no_other_with_it(tmp_path):
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src")]))
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=True
    )
    lines = [re.sub(r" +\d+\.\d s$", "", line) for line in done.stdout.splitlines() if line]
    part = [
        "fits measured",
        "too_large out of memory",
        "broken failed: RuntimeError: No available kernel.",
        "kills died: code 7; on with the next row in a new process",
        "heading",
        "fits measured",
        "kills died: code 7; on with the next row in a new process",
    ]
    assert lines[1:] == ["heading", *part, "heading", *part]


def test_deltaformer_is_this_operator_with_another_sign():
    pytest.importorskip("triton")
    from gpu.operator_part import deltaformer, our_heads
    from gpu.timing import SMOKE, Bench

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 9, 3, 4)  # (B, T, H, D)
    beta = torch.rand(2, 9, 3)
    u = torch.empty_like(v)
    for t in range(9):
        logits = torch.einsum("bhd,bjhd->bhj", q[:, t], k[:, :t]) / 2
        u[:, t] = v[:, t] - beta[:, t, :, None] * torch.einsum("bhj,bjhd->bhd", logits.softmax(-1), u[:, :t])
    torch.testing.assert_close(our_heads(q, k, v, beta), u, rtol=1e-5, atol=1e-5)

    bench = Bench("cpu", SMOKE, 0.0)
    contestant = deltaformer(bench, 16, our_heads)
    assert len(contestant.backward(contestant.forward())) == 4
    with pytest.raises(AssertionError, match="something else"):
        deltaformer(bench, 16, lambda q, k, v, beta: v)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_the_benchmark_says_so_in_one_line(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exited:
        run(monkeypatch)
    assert exited.value.code == 2
    message = capsys.readouterr().err
    assert "CUDA" in message
    assert message.count("\n") == 1


@pytest.mark.slow
def test_what_saving_and_resuming_cost_is_printed():
    command = [sys.executable, "benchmarks/checkpoints.py", "--gigabytes", "0.02", "--rounds", "1"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    titles = [block.splitlines()[0] for block in out.strip().split("\n\n")]
    assert [title.partition(" of ")[0] for title in titles[:5]] == ["rates", *["a save", "a resume"] * 2]
    assert titles[5].startswith("computed from these rates")
    assert "nan" not in out
