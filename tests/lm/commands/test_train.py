"""The command that trains: what it refuses, and how it starts."""

import subprocess
import sys

import pytest

from tiny_runs import ROOT, TINY, run_dirs, train


@pytest.mark.parametrize("command", [[], ["--dry-run"]])
def test_a_backend_that_cannot_run_here_gets_one_clear_line(options, capsys, command):
    mixer = "model.mixer={name: mamba2, backend: mamba_ssm}"
    assert train(TINY, mixer, *options, *command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ssd: backend 'mamba_ssm' cannot take this input: it is on device cpu")


def test_overrides_may_stand_behind_an_option(at_the_root, capsys):
    assert train(TINY, "--print-config", "seed=7", "model.d_model=48") == 0
    out = capsys.readouterr().out
    assert "seed: 7\n" in out
    assert "d_model: 48\n" in out


def test_an_unknown_option_is_refused(capsys):
    with pytest.raises(SystemExit) as left:
        train(TINY, "--dryrun")
    assert left.value.code == 2
    assert "unknown option --dryrun; see --help" in capsys.readouterr().err


@pytest.mark.parametrize("program", [["train.py"], ["-m", "mixerlab", "train"]], ids=["script", "module"])
def test_the_script_and_the_package_are_the_same_command(program, tmp_path, options):
    command = [sys.executable, *program, TINY, *options, "trainer.steps=1", "logging.sample_tokens=0"]
    # The repository's own folders must not stand in the way of what is installed.
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "after 1 steps" in done.stdout
    assert len(run_dirs(tmp_path)) == 1
    refused = subprocess.run([*command, "seed=-1"], cwd=ROOT, capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr == "error: seed = -1: expected at least 0 and at most 2147483647\n"
