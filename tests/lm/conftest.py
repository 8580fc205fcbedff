"""Fixtures of the tests that train the tiny recipe."""

import subprocess
import sys

import pytest

from tiny_runs import ROOT, TINY, packed_documents, places, run_dirs


@pytest.fixture
def at_the_root(monkeypatch):
    """The tiny recipe names its text relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def options(tmp_path, at_the_root):
    """Overrides with which the tiny recipe writes under `tmp_path` alone."""
    return places(tmp_path)


@pytest.fixture
def packed(tmp_path):
    """Overrides for rows with documents packed into them, which have different numbers of labels."""
    return packed_documents(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run of the tiny recipe, which nobody changes, and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "train.py", TINY, *places(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return run_dirs(folder)[0], done


@pytest.fixture
def unequal(options, packed):
    """As `options`, of rows that differ in their number of labels, and with clipping that does something."""
    return [*packed, "optim.grad_clip=0.5", *options]
