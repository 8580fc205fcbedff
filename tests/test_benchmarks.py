"""Benchmarks: each starts, those that can run at sizes that say nothing, and the trial of reliability in small."""

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


def test_every_table_of_the_gpu_benchmark_is_printed(monkeypatch, capsys):
    pytest.importorskip("triton")
    run(monkeypatch, "--smoke", "--lengths", "16", "24")
    heading, *tables = capsys.readouterr().out.split("\n\n")
    assert f"torch {torch.__version__}" in heading
    assert heading.endswith("python benchmarks/feedback_gpu.py --smoke --lengths 16 24")
    titles = ["forward,", "backward,", "forward + backward,", "decoding one position", "a training step"]
    rows = [6 * 2] * 3 + [2, 3]
    for table, title, n_rows in zip(tables, titles, rows, strict=True):
        first, _, *lines = table.splitlines()
        assert title in first
        assert len(lines) == n_rows
        assert not re.search("failed|out of memory|nan", table), table


def test_parts_are_measured_alone(monkeypatch, capsys):
    pytest.importorskip("triton")
    run(monkeypatch, "--smoke", "--parts", "decoding")
    _, table = capsys.readouterr().out.split("\n\n")
    assert table.startswith("decoding one position")


def test_what_does_not_fit_is_a_row_that_says_so():
    module = runpy.run_path(str(SCRIPT))

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 GiB.\nMore lines.")

    def broken():
        raise RuntimeError("No available kernel.\nMore lines.")

    bench = module["Bench"]("cpu", module["SMOKE"], 0.0)
    assert bench.measure("name", too_large) == "out of memory"
    assert bench.measure("name", broken) == "failed: RuntimeError: No available kernel."


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
