"""Influence with held routing, against what autograd and the operators' definitions say of it (float64)."""

import pytest
import torch

import mixerlab.mixers.gated_deltanet
import mixerlab.mixers.mamba
import mixerlab.mixers.mamba2
from mixerlab.mixers import build_mixer
from mixerlab.mixers.attention import Attention
from mixerlab.mixers.testing import double, inputs

D, T = 8, 7
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1]])


class Given(torch.nn.Module):
    """In place of a projection: values that do not depend on the input."""

    values: torch.Tensor

    def forward(self, x):
        return self.values


def every(time=T):
    return torch.eye(time, dtype=torch.float64)[None]


def held(mixer, *arguments):
    return mixer.mix_fixed(*arguments)


def value_jacobian(mixer, x, segment_ids, mixed=None):
    """d output / d values, (T, D, T, G * K), where queries, keys and gains stay those of `x`."""
    given, n_values = Given(), mixer.v_proj.out_features
    mixer.v_proj = given
    mixer.out_proj = mixed or torch.nn.Identity()

    def run(values):
        given.values = values
        return mixer(x, segment_ids)

    return torch.autograd.functional.jacobian(run, inputs(1, T, n_values, seed=3))[0, :, :, 0]


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize(
    "spec",
    [
        {"name": "attention", "n_heads": 4, "n_kv_heads": 2, "bias": True},
        {"name": "attention", "n_heads": 2, "window": 3, "qk_norm": True},
        {"name": "deltaformer", "n_heads": 4, "n_kv_heads": 2},
    ],
    ids=lambda spec: spec["name"],
)
def test_each_head_has_the_derivative_of_its_output_with_respect_to_its_values(spec, segment_ids):
    mixer = double(lambda d: build_mixer(spec, d), D)
    x = inputs(1, T, D)
    influence = held(mixer, x, every(), segment_ids)[0]
    heads, groups, width = mixer.n_heads, mixer.n_kv_heads, mixer.head_dim
    jacobian = value_jacobian(mixer, x, segment_ids)
    for h in range(heads):
        expected = jacobian[:, h * width, :, h * groups // heads * width]
        torch.testing.assert_close(influence[h], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
@pytest.mark.parametrize("shift", [0, 1])
def test_sessa_has_a_path_from_each_forward_head_through_each_feedback_head(shift, segment_ids):
    spec = {"name": "sessa", "n_heads": 2, "n_feedback_heads": 2}
    mixer = double(lambda d: build_mixer(spec, d), D)
    x = inputs(1, T, D)
    influence = held(mixer, x, every(), segment_ids)[0]
    rolled = torch.nn.Linear(D, D, bias=False, dtype=torch.float64)
    rolled.weight.data = torch.eye(D, dtype=torch.float64).roll(shift * D // 2, 0)  # which head feeds which
    jacobian = value_jacobian(mixer, x, segment_ids, rolled)
    for head in range(2):
        fed = (head + shift) % 2
        expected = jacobian[:, fed * D // 2, :, head * D // 2]
        torch.testing.assert_close(influence[fed * 2 + head], expected, rtol=1e-10, atol=1e-12)


def test_attention_without_queries_spreads_evenly():
    mixer = build_mixer("attention", D).double()
    mixer.q_proj.weight.data.zero_()
    influence = held(mixer, inputs(1, 50, D), every(50))[0]
    expected = (1 / torch.arange(1, 51, dtype=torch.float64)[:, None]).expand(50, 50).tril()
    torch.testing.assert_close(influence, expected.expand_as(influence), rtol=1e-14, atol=0)


def captured(monkeypatch, module, operator, mixer, x, segment_ids):
    """What `mixer(x)` gives its operator, and the operator's output."""
    original, seen = getattr(module, operator), []

    def watched(*arguments, **options):
        y = original(*arguments, **options)
        seen.append((arguments, y[0]))
        return y

    with monkeypatch.context() as patched:
        patched.setattr(module, operator, watched)
        mixer(x, segment_ids)
    return seen[0]


def decays(dt, rate, segment_ids):
    """exp(rate * (the steps after tau, to t)) by t and tau, one at a time; 0 across documents."""
    ids = torch.zeros(1, T) if segment_ids is None else segment_ids
    table = torch.zeros(T, T, dtype=torch.float64)
    for tau in range(T):
        for t in range(tau, T):
            if ids[0, t] == ids[0, tau]:
                table[t, tau] = torch.exp(rate * dt[tau + 1 : t + 1].sum())
    return table


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
def test_mamba_has_its_transition_products(monkeypatch, segment_ids):
    mixer = double(lambda d: build_mixer({"name": "mamba", "d_state": 3}, d), D)
    x = inputs(1, T, D)
    (u, dt, A, B_in, C_out, skip), y = captured(
        monkeypatch, mixerlab.mixers.mamba, "selective_scan", mixer, x, segment_ids
    )
    influence = held(mixer, x, every(), segment_ids)[0]
    for e in range(mixer.inner):
        expected = skip[e] * every()[0]
        for n in range(3):
            products = decays(dt[0, :, e], A[e, n], segment_ids)
            expected = expected + products * C_out[0, :, None, n] * (B_in[0, :, n] * dt[0, :, e])
        torch.testing.assert_close(influence[e], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(expected @ u[0, :, e], y[0, :, e])


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
def test_mamba2_has_its_transition_products(monkeypatch, segment_ids):
    spec = {"name": "mamba2", "head_dim": 4, "n_groups": 2, "d_state": 3}
    mixer = double(lambda d: build_mixer(spec, d), D)
    x = inputs(1, T, D)
    (u, dt, A, B_in, C_out, skip), y = captured(
        monkeypatch, mixerlab.mixers.mamba2, "ssd", mixer, x, segment_ids
    )
    influence = held(mixer, x, every(), segment_ids)[0]
    for h in range(mixer.n_heads):
        group = h * 2 // mixer.n_heads
        products = decays(dt[0, :, h], A[h], segment_ids)
        expected = products * (C_out[0, :, group] @ B_in[0, :, group].T) * dt[0, :, h]
        expected = expected + skip[h] * every()[0]
        torch.testing.assert_close(influence[h], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(expected @ u[0, :, h], y[0, :, h])


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["whole", "packed"])
def test_gated_deltanet_has_its_transition_products(monkeypatch, segment_ids):
    spec = {"name": "gated_deltanet", "n_heads": 2, "head_dim": 3}
    mixer = double(lambda d: build_mixer(spec, d), D)
    x = inputs(1, T, D)
    (q, k, v, log_decay, beta), y = captured(
        monkeypatch, mixerlab.mixers.gated_deltanet, "gated_delta_rule", mixer, x, segment_ids
    )
    influence = held(mixer, x, every(), segment_ids)[0]
    ids = torch.zeros(1, T) if segment_ids is None else segment_ids
    for h in range(2):
        expected = torch.zeros(T, T, dtype=torch.float64)
        for tau in range(T):
            found = beta[0, tau, h] * k[0, tau, h]  # what is left of k_tau in the state
            for t in range(tau, T):
                if ids[0, t] != ids[0, tau]:
                    break
                if t > tau:
                    key = k[0, t, h]
                    found = log_decay[0, t, h].exp() * (found - beta[0, t, h] * (found @ key) * key)
                expected[t, tau] = found @ q[0, t, h]
        torch.testing.assert_close(influence[h], expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(expected @ v[0, :, h], y[0, :, h])


def test_selective_attention_has_the_paths_past_it_and_through_it():
    spec = {"name": "selective_attention", "below": {"name": "mamba2", "head_dim": 8}, "n_heads": 2}
    mixer = double(lambda d: build_mixer(spec, d), D)
    x = inputs(1, T, D)
    below = mixer.below.mix_fixed(x, every())[0]  # (2, T, T)
    h = mixer.below(x)
    attending, alpha = mixer._select(h, training=False)
    assert 0 < attending.sum() < T, "some attend, others do not"
    attention = mixer.attention.mix_fixed(h, every(), selected=attending > 0.5)[0]
    amount = (attending * alpha)[0, :, None]
    expected = [(1 - amount) * low + amount * (high @ low) for high in attention for low in below]
    torch.testing.assert_close(held(mixer, x, every())[0], torch.stack(expected))


def test_two_mixers_side_by_side_have_the_heads_of_both():
    mixer = double(lambda d: build_mixer("parallel", d), D)
    x = inputs(1, T, D)
    both = held(mixer, x, every())
    apart = [part.mix_fixed(x, every()) for part in (mixer.first, mixer.second)]
    torch.testing.assert_close(both, torch.cat(apart, dim=1))
    mixer.second.mix_fixed = lambda *_: None
    assert held(mixer, x, every()) is None, "half of it would be no answer"


def test_sessa_shows_what_it_routes_by():
    mixer = double(lambda d: build_mixer("sessa", d), D)
    x = inputs(1, T, D)
    shown = mixer.routing(x)
    feedback = shown["gain"][..., None] * shown["feedback attention"]  # (1, 1, T, T)
    solved = torch.linalg.solve(every() - feedback, shown["forward attention"])
    torch.testing.assert_close(held(mixer, x, every()), solved)
    apart = mixer.routing(x, SEGMENTS)["feedback attention"]
    torch.testing.assert_close(apart[..., 3:, 3:], mixer.routing(x[:, 3:])["feedback attention"])
    assert (apart[..., 3:, :3] == 0).all()
    control = build_mixer({"name": "sessa", "feedback": False}, D).double()
    assert list(control.routing(x)) == ["forward attention"]
    torch.testing.assert_close(control.mix_fixed(x, every()), Attention.mix_fixed(control, x, every()))
