"""docs/your-own-mixer.md, followed to the letter: the package it shows installs, keeps the contract and trains."""

import sys

import pytest

from pages import MIXERLAB, ROOT, Page, break_package, run

PAGE = Page("your-own-mixer.md")
TINY = ROOT / "tests" / "golden" / "tiny.yaml"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return PAGE.install("shift_mixer", tmp_path_factory.mktemp("shift"), tmp_path_factory.mktemp("site"))


def train(site, tmp_path, *overrides, code=0):
    places = [f"logging.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    text = f"data.files={ROOT / 'tests' / 'golden' / 'text.txt'}"
    return run([*MIXERLAB, "train", str(TINY), "trainer.steps=3", text, *overrides, *places], site, code)


def test_a_whole_mixer_takes_fewer_than_60_lines():
    assert PAGE.lines_of_code() < 60


def test_the_mixer_keeps_the_contract(site):
    run([sys.executable, "-c", *PAGE.command("python -c")], site)


def test_the_command_shown_is_a_right_one(site):
    run([*MIXERLAB, "train", *PAGE.command("mixerlab train"), "--print-config"], site)


def test_a_name_is_all_it_takes_to_train_with_it(site, tmp_path):
    train(site, tmp_path, "model.mixer=[{name: shift, share: 0.9}, sessa]")
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    run([*MIXERLAB, "generate", str(folder), "--max-new-tokens", "5"], site)
    assert "share: 0.9" in (folder / "recipe.yaml").read_text()


def test_a_module_in_the_recipe_does_the_same(tmp_path):
    (tmp_path / "shift_mixer.py").write_text(PAGE.shown("python"))
    train(tmp_path, tmp_path, "plugins=shift_mixer", "model.mixer=shift")


def test_an_option_of_an_installed_mixer_is_checked(site, tmp_path):
    done = train(site, tmp_path, "model.mixer={name: shift, shar: 1}", code=2)
    assert done.stderr == "error: model.mixer.shar = 1: no such key; did you mean 'share'? valid: share\n"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise RuntimeError('out of order\\n with details')", "RuntimeError: out of order"),
        ("x = 1", "'shift_mixer' registers no mixer of that name"),
    ],
)
def test_a_broken_package_is_named(site, tmp_path, content, reason):
    broken = break_package(site, "shift_mixer", content, tmp_path / "site")
    (line,) = train(broken, tmp_path, "model.mixer=shift", code=2).stderr.splitlines()
    where = "model.mixer = 'shift': mixer 'shift' of the installed package 'shift-mixer'"
    assert line.startswith(f"error: {where}")
    assert reason in line


def test_a_broken_package_harms_only_those_who_ask_for_it(site, tmp_path):
    broken = break_package(site, "shift_mixer", "raise RuntimeError", tmp_path / "site")
    train(broken, tmp_path, "model.mixer=identity")
    assert "did you mean 'shift'?" in train(broken, tmp_path, "model.mixer=shitf", code=2).stderr
