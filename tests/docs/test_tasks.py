"""docs/tasks.md: its commands are right, and its table has every task."""

import shlex

import pytest

from mixerlab import train
from mixerlab.__main__ import main
from mixerlab.data import DATA
from mixerlab.data.tasks.task import Task
from pages import Page

PAGE = Page("tasks.md")
COMMANDS = [shlex.split(line)[1:] for line in PAGE.shown("bash").splitlines()]
TASKS = {name for name in DATA.registered() if issubclass(DATA.implementation(name), Task)}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[2].removeprefix("name="))
def test_a_command_is_a_recipe(command, capsys):
    assert main([*command, "--print-config"]) == 0
    (data,) = [word.removeprefix("data=") for word in command if word.startswith("data=")]
    assert f"name: {data}\n" in capsys.readouterr().out


def test_there_is_a_line_and_a_command_for_every_task():
    assert {
        word.removeprefix("data=") for command in COMMANDS for word in command if word.startswith("data=")
    } == TASKS
    assert {name for name in TASKS if f"\n| `{name}` | " in PAGE.text} == TASKS


def test_training_validates_on_rows_that_are_longer(tmp_path):
    run = train(
        "quickstart",
        data={"name": "diffuse_mqar", "lags": [160, 300], "n_valid": 4, "n_test": 4},
        model={"d_model": 16, "n_layers": 1},
        trainer={"steps": 2, "batch_size": 2, "val_every": 2},
        logging={"dir": str(tmp_path)},
    )
    metrics = run.metrics()
    for name in ("valid", "lag_160", "lag_300"):
        assert 0 <= metrics[f"{name}/accuracy"].dropna().iloc[-1] <= 1


def test_the_python_of_the_page_gives_the_ceiling(capsys):
    exec(PAGE.shown("python").replace("800", "20"), {})
    assert 0.5 < float(capsys.readouterr().out) <= 1
