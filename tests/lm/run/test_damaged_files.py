"""A bit flipped in any file of a run folder is found, in one line, or changes nothing."""

import logging

import pytest

from damage import a_run, survey

UNNOTED = ("metrics.csv", "events.out.")
"""Files that are appended to: damage in them stops nothing."""


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.ERROR, "mixerlab")


@pytest.mark.parametrize("is_finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("flips", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_each_is_found_or_harmless(options, is_finished, flips):
    counts = survey(a_run(options, is_finished), options, flips)
    assert {"recipe.yaml", "tokenizer.json", "environment.json", "checksums.json"} <= set(counts)
    assert ("result.json" in counts) == is_finished
    for name, kinds in counts.items():
        assert kinds["harmless" if name.startswith(UNNOTED) else "found"] >= 0.9 * flips - 1, (name, kinds)


@pytest.mark.parametrize("flips", [3, pytest.param(25, marks=pytest.mark.slow)])
def test_without_checksums_nothing_but_messages_comes_of_them(options, flips):
    run = a_run(options)
    (run / "checksums.json").unlink()  # as in a run of an older version
    survey(run, options, flips, has_checksums=False)
