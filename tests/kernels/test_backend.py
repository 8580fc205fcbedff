import logging

import pytest

from mixerlab.kernels.backend import choose, use_backend

BACKENDS = {"fast": lambda: "needs a GPU", "plain": lambda: None, "slow": lambda: None}


def test_auto_takes_the_first_that_can():
    assert choose("op", "auto", BACKENDS) == "plain"


def test_a_forced_backend_is_used():
    assert choose("op", "slow", BACKENDS) == "slow"


def test_a_forced_backend_that_cannot_says_why_and_which_can():
    with pytest.raises(ValueError, match=r"op: .*'fast'.*needs a GPU.*\['plain', 'slow'\]"):
        choose("op", "fast", BACKENDS)


def test_an_unknown_backend_is_answered_with_the_valid_names():
    with pytest.raises(ValueError, match=r"'fsat'.*\['auto', 'fast', 'plain', 'slow'\]"):
        choose("op", "fsat", BACKENDS)


def test_nothing_that_can_says_why_of_each():
    with pytest.raises(ValueError, match=r"too long.*too wide.*none"):
        choose("op", "auto", {"a": lambda: "too long", "b": lambda: "too wide"})


def test_use_backend_changes_auto_and_nothing_else():
    with use_backend("slow"):
        assert choose("op", "auto", BACKENDS) == "slow"
        assert choose("op", "plain", BACKENDS) == "plain"
        with use_backend("plain"):
            assert choose("op", "auto", BACKENDS) == "plain"
        assert choose("op", "auto", BACKENDS) == "slow"
    assert choose("op", "auto", BACKENDS) == "plain"


def test_use_backend_ends_with_an_error_too():
    with pytest.raises(ValueError, match="needs a GPU"), use_backend("fast"):
        choose("op", "auto", BACKENDS)
    assert choose("op", "auto", BACKENDS) == "plain"


def test_each_decision_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="mixerlab.kernels"):
        for _ in range(2):
            choose("logged once", "auto", BACKENDS)
            choose("logged once", "slow", BACKENDS)
    assert [r.getMessage() for r in caplog.records] == [
        "logged once: backend plain (requested: auto)",
        "logged once: backend slow (requested: slow)",
    ]
