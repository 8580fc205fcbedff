"""The command line: verbs, their help, and errors as messages."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mixerlab
from mixerlab.__main__ import VERBS, main, run
from mixerlab.kernels.backend import BackendError
from mixerlab.options import ConfigError
from tiny_runs import ROOT, TINY

TAKES = {
    "train": ["recipe", "key=value", "--print-config", "--dry-run", "resume=auto", "exit codes"],
    "generate": [
        "RUN",
        "--prompt",
        "--max-new-tokens",
        "--temperature",
        "--top-p",
        "--seed",
        "--checkpoint",
        "--device",
    ],
    "validate": ["RUN", "--checkpoint", "--batches", "--device"],
    "evaluate": [
        *("RUN", "--tasks", "--include-path", "--num-fewshot", "--limit", "--batch-size", "--max-length"),
        *("--checkpoint", "--device", "--devices"),
    ],
    "describe": ["RECIPE", "key=value", "--mixers", "--lengths"],
    "convert": ["FOLDER", "--to"],
    "export": ["RUN", "--to", "--format", "--max-shard-size", "--checkpoint"],
    "memory": ["RUN_OR_RECIPE", "--mixers", "--measure", "--text", "--out", "--checkpoint"],
    "attribute": ["RUN", "--text", "--faithfulness", "--at", "--target", "--method", "--out", "--checkpoint"],
    "checkpoints": ["RUN", "--to", "--shards", "--checkpoint"],
    "sweep": ["RECIPE", "key=value", "--jobs", "--launcher", "--option", "--dry-run", "exit codes"],
    "report": ["SWEEP", "--metric", "--to"],
    "keys": ["Markdown"],
}


def test_every_verb_is_a_file_of_the_commands():
    files = {path.stem for path in (ROOT / "lm" / "commands").glob("*.py")} - {"__init__", "arguments"}
    assert files == set(VERBS) == set(TAKES)


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_says_what_it_takes(verb, capsys):
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: mixerlab {verb}" in out
    for wanted in TAKES[verb]:
        assert wanted in out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_without_a_verb_there_is_help(arguments, capsys):
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: mixerlab VERB")
    for verb, about in VERBS.items():
        assert f"  {verb} " in out
        assert about in out


def test_the_command_alone_prints_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mixerlab"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("usage: mixerlab VERB")


def test_a_wrong_verb_is_answered_with_the_nearest(capsys):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no verb 'trian'; did you mean 'train'? valid: train, sweep")
    assert error.count("\n") == 1


def test_arguments_are_those_of_the_process_unless_given(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mixerlab", "validate", "nowhere"])
    assert main() == 2
    assert "run folder nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["generate", "validate", "checkpoints"])
def test_every_verb_that_takes_a_run_says_what_is_wrong_with_it(verb, tmp_path, capsys):
    assert main([verb, str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: run folder {tmp_path}: it has no recipe.yaml, so there is nothing to load\n"
    )


def raising(error):
    def command():
        raise error

    return command


def test_what_the_user_can_mend_is_one_line_and_code_2(capsys):
    for error in (ConfigError("seed = -1: wrong"), BackendError("no backend")):
        assert run(raising(error)) == 2
        assert capsys.readouterr().err == f"error: {error}\n"


def test_ctrl_c_ends_quietly():
    assert run(raising(KeyboardInterrupt())) == 130


@pytest.mark.parametrize("error", [ValueError("x"), TypeError("x"), RuntimeError("x")])
def test_a_fault_in_the_code_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run(raising(error))


WITHOUT_TORCH = """
import sys
from mixerlab.__main__ import main
main(["--help"])
for verb in ("train", "describe", "convert", "export", "checkpoints", "keys"):
    try:
        main([verb, "--help"])
    except SystemExit:
        pass
assert "torch" not in sys.modules
import mixerlab
assert "torch" not in sys.modules
"""


def test_help_answers_at_once():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True, capture_output=True)


def gnu_openmp_shows(program, **variables):
    """What GNU OpenMP says of its settings, GOMP_SPINCOUNT alone, when a command loads torch."""
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run(
        [sys.executable, *program, TINY, "--print-config"],
        cwd=ROOT,
        env=environment | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    if not (shown := re.search(r"GOMP_SPINCOUNT = '(\w+)'", done.stderr)):
        pytest.skip("torch brings another OpenMP here")
    return shown[1]


@pytest.mark.parametrize("program", [["-m", "mixerlab", "train"], ["train.py"]])
def test_waiting_threads_soon_sleep(program):
    assert gnu_openmp_shows(program) == "2000"


@pytest.mark.parametrize(
    ("variables", "shown"),
    [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_how_threads_wait_is_the_users_to_say(variables, shown):
    assert gnu_openmp_shows(["train.py"], **variables) == shown


def test_the_package_is_a_module_to_run_and_a_command():
    command = str(Path(sys.executable).with_name("mixerlab"))
    for program in ([sys.executable, "-m", "mixerlab"], [command]):
        done = subprocess.run([*program, "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: mixerlab VERB")


def test_what_the_package_offers_is_imported_when_it_is_asked_for():
    for name in mixerlab.__all__:
        assert callable(getattr(mixerlab, name))
    assert mixerlab.open_run == mixerlab.Run.open
    with pytest.raises(AttributeError, match="module 'mixerlab' has no attribute 'trian'"):
        mixerlab.trian  # noqa: B018
