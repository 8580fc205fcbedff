"""The attention mixer: positions, windows and caches. Its operator is tested in tests/kernels/test_attention.py."""

import pytest
import torch

from mixerlab.mixers import build_mixer
from mixerlab.mixers.rotary import rotate, segment_positions


def test_rotation_depends_on_the_distance_alone():
    q, k = (torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))

    def score(i, j):
        return (rotate(q, torch.tensor([[i]]), 10000.0) * rotate(k, torch.tensor([[j]]), 10000.0)).sum()

    torch.testing.assert_close(score(3, 1), score(12, 10), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rotate(q, torch.tensor([[0]]), 10000.0), q)


def test_positions_start_anew_in_each_segment():
    ids = torch.tensor([[0, 0, 0, 1, 1, 4], [2, 3, 3, 3, 3, 3]])
    assert segment_positions(ids).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_a_window_keeps_only_its_positions_and_counts_only_its_pairs():
    windowed = build_mixer({"name": "attention", "window": 8}, 64)
    assert windowed.init_state(1, 1000).k.shape[2] == 8
    pairs = sum(min(i + 1, 8) for i in range(100))
    assert windowed.flops(100) == 2 * 100 * 4 * 64 * 64 + 4 * pairs * 64


@pytest.mark.parametrize("window", [None, 4])
def test_a_new_position_attends_to_the_cache_in_place(window, monkeypatch):
    given = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def watch(q, k, v, **options):
        given.append((k.data_ptr(), v.data_ptr()))
        return attend(q, k, v, **options)

    mixer = build_mixer({"name": "attention", "window": window}, 32)
    state = mixer.init_state(2, 12)
    with torch.no_grad():
        _, state = mixer.extend(torch.randn(2, 5, 32), state)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        for _ in range(3):
            _, state = mixer.extend(torch.randn(2, 1, 32), state)
    assert given == [(state.k.data_ptr(), state.v.data_ptr())] * 3
