"""Attention against a loop over positions, and its two ways of keeping packed documents apart."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from mixerlab.mixers import build_mixer
from mixerlab.mixers.attention import block_mask, causal_attention, rotate, segment_positions


@pytest.mark.parametrize("some", [False, True], ids=["all keys", "selected keys"])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_equals_a_loop_over_positions(window, some):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 12, 8, dtype=torch.float64, generator=generator)
    k, v = (torch.randn(2, 2, 12, 8, dtype=torch.float64, generator=generator) for _ in range(2))
    segment_ids = torch.tensor([[0] * 12, [0] * 3 + [1] * 9])
    selected = torch.rand(2, 12, generator=generator) < 0.4 if some else None
    y = causal_attention(q, k, v, segment_ids, window, selected)
    for b in range(2):
        for h in range(4):
            for i in range(12):
                seen = [
                    j
                    for j in range(i + 1)
                    if segment_ids[b, j] == segment_ids[b, i]
                    and (window is None or i - j < window)
                    and (selected is None or selected[b, j] or j == i)
                ]
                weights = torch.softmax(k[b, h // 2, seen] @ q[b, h, i] / 8**0.5, dim=0)
                torch.testing.assert_close(y[b, h, i], weights @ v[b, h // 2, seen])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 40, 200])
@pytest.mark.parametrize("time", [100, 128, 700])
def test_the_mask_for_gpus_shows_what_the_dense_one_shows(window, time):
    q, k, v = (torch.randn(2, 2, time, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    ids = torch.stack([(torch.arange(time) > 70).long(), torch.arange(time) // 90])
    for segment_ids in (ids, None):
        mask = block_mask(segment_ids, window, time, q.device)
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=mask), causal_attention(q, k, v, segment_ids, window)
        )
        # The blocks that a GPU visits are those with something to see.
        whole = create_block_mask(
            mask.mask_mod, 2 if segment_ids is not None else None, None, time, time, device="cpu"
        )
        assert torch.equal(mask.to_dense(), whole.to_dense())
        selected = torch.rand(2, time, generator=torch.Generator().manual_seed(3)) < 0.2
        torch.testing.assert_close(
            flex_attention(q, k, v, block_mask=block_mask(segment_ids, window, time, q.device, selected)),
            causal_attention(q, k, v, segment_ids, window, selected),
        )


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
