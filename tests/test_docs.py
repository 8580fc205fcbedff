"""docs/your-own-mixer.md, followed to the letter: the package it shows installs, keeps the contract and trains."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "your-own-mixer.md").read_text(encoding="utf-8")


def shown(language):
    (block,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return block


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder in which the package lies installed, apart from the environment that the tests run in."""
    source, site = tmp_path_factory.mktemp("shift"), tmp_path_factory.mktemp("site")
    (source / "shift_mixer.py").write_text(shown("python"))
    (source / "pyproject.toml").write_text(shown("toml"))
    options = ["--no-deps", "--no-build-isolation", "--target", str(site)]
    run([sys.executable, "-m", "pip", "install", "-q", *options, str(source)], site)
    return site


def run(command, site):
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{ROOT}", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    return done


def train(site, tmp_path, *overrides):
    folders = [f"logging.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]
    return run(
        [sys.executable, "train.py", "tests/golden/tiny.yaml", "trainer.steps=3", *overrides, *folders], site
    )


def test_a_whole_mixer_takes_fewer_than_60_lines():
    code = [line for line in (shown("python") + shown("toml")).splitlines() if line.strip()]
    assert len(code) < 60


def test_the_mixer_keeps_the_contract(site):
    (check,) = [line for line in shown("bash").splitlines() if line.startswith("python -c")]
    done = run([sys.executable, *shlex.split(check)[1:]], site)
    assert done.returncode == 0, done.stderr


def test_a_name_is_all_it_takes_to_train_with_it(site, tmp_path):
    done = train(site, tmp_path, "model.mixer=[{name: shift, share: 0.9}, sessa]")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "tiny").iterdir()
    done = run([sys.executable, "-m", "lm.generate", str(folder), "--max-new-tokens", "5"], site)
    assert done.returncode == 0, done.stderr
    assert "share: 0.9" in (folder / "recipe.yaml").read_text()


def test_a_module_in_the_recipe_does_the_same(tmp_path):
    (tmp_path / "shift_mixer.py").write_text(shown("python"))
    done = train(tmp_path, tmp_path, "plugins=shift_mixer", "model.mixer=shift")
    assert done.returncode == 0, done.stderr


def test_an_option_of_an_installed_mixer_is_checked(site, tmp_path):
    done = train(site, tmp_path, "model.mixer={name: shift, shar: 1}")
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
    broken = tmp_path / "site"
    broken.mkdir()
    for item in site.glob("*.dist-info"):
        (broken / item.name).symlink_to(item)
    (broken / "shift_mixer.py").write_text(content)
    done = train(broken, tmp_path, "model.mixer=shift")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "error: model.mixer = 'shift': mixer 'shift' of the installed package 'shift-mixer'"
    )
    assert reason in line


def test_a_broken_package_harms_only_those_who_ask_for_it(site, tmp_path):
    (broken := tmp_path / "site").mkdir()
    for item in site.glob("*.dist-info"):
        (broken / item.name).symlink_to(item)
    (broken / "shift_mixer.py").write_text("raise RuntimeError")
    assert train(broken, tmp_path, "model.mixer=identity").returncode == 0
    assert "did you mean 'shift'?" in train(broken, tmp_path, "model.mixer=shitf").stderr
