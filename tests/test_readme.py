"""What the README shows is what there is."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mixerlab.__main__ import VERBS, main
from mixerlab.lm.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_recipe_shown_is_the_quickstart():
    shown = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert shown is not None
    assert shown[1].strip() == (ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8").strip()


def commands(program):
    lines = [line.partition("  #")[0] for line in README.splitlines() if line.startswith(program)]
    assert lines
    return lines


@pytest.mark.parametrize("command", commands("mixerlab train"))
def test_every_training_command_is_a_right_one(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [a for a in shlex.split(command)[1:] if not a.startswith(("--", "resume"))]
    assert main([*arguments, "--print-config"]) == 0


def test_the_quickstart_command_is_a_right_one():
    (line,) = [line for line in README.splitlines() if "python train.py recipes" in line]
    command = shlex.split(line.partition("&&")[2])
    done = subprocess.run(
        [sys.executable, *command[1:], "--print-config"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "name: quickstart" in done.stdout


@pytest.mark.parametrize(
    "command", [c for verb in ("generate", "validate") for c in commands(f"mixerlab {verb}")]
)
def test_commands_on_runs_have_right_options(command, capsys):
    assert main(shlex.split(command)[1:]) == 2, "there is no such run here"
    assert "run folder runs/quickstart/RUN: no such folder" in capsys.readouterr().err


def test_every_verb_shown_exists():
    shown = set(re.findall(r"^mixerlab (\w+)", README, re.MULTILINE))
    assert shown <= set(VERBS)


@pytest.mark.parametrize("command", commands("mixerlab describe"))
def test_every_table_of_costs_is_a_right_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(shlex.split(command)[1:]) == 0


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def test_the_named_recipes_exist():
    (sentence,) = re.findall(r"Other recipes: (.*?)\n\n", README, re.DOTALL)
    names = re.findall(r"`([\w-]+)`", sentence)
    assert len(names) > 5
    for name in names:
        assert load_recipe(name).name == name
