"""A page of docs/ that shows a package: its code, the package installed, and commands run with it."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MIXERLAB = [sys.executable, "-P", "-m", "mixerlab"]


class Page:
    def __init__(self, name: str):
        self.text = (ROOT / "docs" / name).read_text(encoding="utf-8")

    def shown(self, language: str) -> str:
        """The page's one block of code in a language."""
        (block,) = self.all_shown(language)
        return block

    def all_shown(self, language: str) -> list[str]:
        return re.findall(rf"```{language}\n(.*?)```", self.text, re.DOTALL)

    def command(self, program: str) -> list[str]:
        """The arguments of the one command that begins so."""
        (line,) = [line for line in self.shown("bash").splitlines() if line.startswith(program)]
        return shlex.split(line.removeprefix(program))

    def lines_of_code(self) -> int:
        return sum(bool(line.strip()) for line in (self.shown("python") + self.shown("toml")).splitlines())

    def install(self, module: str, source: Path, site: Path) -> Path:
        """Puts the package that the page shows into `site`, apart from the environment that the tests run in."""
        (source / f"{module}.py").write_text(self.shown("python"))
        (source / "pyproject.toml").write_text(self.shown("toml"))
        options = ["--no-deps", "--no-build-isolation", "--target", str(site)]
        run([sys.executable, "-m", "pip", "install", "-q", *options, str(source)], site)
        return site


def break_package(site: Path, module: str, content: str, broken: Path) -> Path:
    """The same installation with another content of its module."""
    broken.mkdir()
    for item in site.glob("*.dist-info"):
        (broken / item.name).symlink_to(item)
    (broken / f"{module}.py").write_text(content)
    return broken


def run(command: list[str], site: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Runs a command far from the repository, with the package on the path."""
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=site, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done
