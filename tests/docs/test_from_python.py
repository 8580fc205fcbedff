"""docs/from-python.md is one program that runs, and the README's piece of it."""

import re
import sys

import pytest

from pages import ROOT, Page, run

README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HOME", str(folder))  # where the cache lies
        yield folder


def test_the_page_runs_from_top_to_bottom(home):
    program = "\n".join(Page("from-python.md").all_shown("python"))
    done = run([sys.executable, "-c", program], home)
    for expected in ("'steps': 20", "mixer=attention", "mixer=mamba2"):
        assert expected in done.stdout


def test_what_the_readme_shows_runs(home):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    small = 'trainer={"val_batches": 1, "batch_size": 2, '
    assert "trainer={" in program
    done = run([sys.executable, "-c", program.replace("trainer={", small)], home)
    assert "def " in done.stdout
