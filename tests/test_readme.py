"""What the README shows is what there is."""

import re
import shlex
from pathlib import Path

import pytest
from mixerlab.lm.config import load_recipe

import train
from mixerlab.lm import describe, generate

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


@pytest.mark.parametrize("command", commands("python train.py"))
def test_every_training_command_is_a_right_one(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    arguments = [a for a in shlex.split(command)[2:] if not a.startswith(("--", "resume"))]
    assert train.main([*arguments, "--print-config"]) == 0


def test_the_generation_command_has_right_options(capsys):
    (command,) = commands("python -m lm.generate")
    assert generate.main(["nowhere", *re.findall(r"(--[\w-]+) (\".*?\"|\S+)", command)[0]]) == 2
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    offered = capsys.readouterr().out
    for option in re.findall(r"--[\w-]+", command):
        assert option in offered


@pytest.mark.parametrize("command", commands("python -m lm.describe"))
def test_every_table_of_costs_is_a_right_one(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert describe.main(shlex.split(command)[3:]) == 0


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)", README))
def test_links_lead_somewhere(link):
    assert link.startswith("https://") or (ROOT / link).exists()


def test_the_named_recipes_exist():
    for name in re.findall(r"`([\w-]+\.yaml)`", README):
        assert load_recipe(ROOT / "recipes" / name)
