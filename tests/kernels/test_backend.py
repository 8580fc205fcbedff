import logging

import pytest
import torch

from mixerlab.kernels import backend
from mixerlab.kernels.backend import choose, use_backend, why_not_cuda, why_not_triton

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


def test_auto_passes_over_what_runs_by_name_alone():
    assert choose("op", "auto", BACKENDS, by_name_alone=("plain",)) == "slow"
    assert choose("op", "plain", BACKENDS, by_name_alone=("plain",)) == "plain"
    with use_backend("plain"):
        assert choose("op", "auto", BACKENDS, by_name_alone=("plain",)) == "plain"


def test_use_backend_changes_auto_and_nothing_else():
    with use_backend("slow"):
        assert choose("op", "auto", BACKENDS) == "slow"
        assert choose("op", "plain", BACKENDS) == "plain"
        with use_backend("plain"):
            assert choose("op", "auto", BACKENDS) == "plain"
        assert choose("op", "auto", BACKENDS) == "slow"
    assert choose("op", "auto", BACKENDS) == "plain"


def test_use_backend_leaves_operators_without_that_backend_alone():
    with use_backend("other"):
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


class OnGpu:
    """What the checks ask of a tensor."""

    is_cuda = True
    device = torch.device("cuda", 1)


def test_kernels_for_cuda_say_why_they_cannot_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: {1: (7, 5)}[device])
    assert why_not_cuda(torch.zeros(1)) == "it is on device cpu, and the kernels run on CUDA"
    assert why_not_cuda(OnGpu()) is None
    assert why_not_cuda(OnGpu(), 80) == "the GPU has compute capability 7.5, and the kernels need 8.0"
    assert why_not_cuda(OnGpu(), 75) is None


def test_triton_runs_on_cuda_and_interpreted_anywhere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(backend, "_HAS_TRITON", True)
    monkeypatch.setattr(backend, "INTERPRETED", False)
    assert "on device cpu" in why_not_triton(torch.zeros(1), 80)
    assert why_not_triton(OnGpu()) is None
    monkeypatch.setattr(backend, "INTERPRETED", True)
    assert why_not_triton(torch.zeros(1), 80) is None
    assert "7.5" in why_not_triton(OnGpu(), 80)
    monkeypatch.setattr(backend, "_HAS_TRITON", False)
    assert why_not_triton(torch.zeros(1)) == "triton is not installed"
