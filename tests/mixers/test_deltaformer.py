"""DeltaFormer against a loop over positions, and against what the delta rule says."""

import pytest
import torch

from mixerlab.mixers import build_mixer
from mixerlab.mixers.testing import double, inputs


def deltaformer(**options):
    return double(lambda d_model: build_mixer({"name": "deltaformer", "n_heads": 4, **options}, d_model))


def rotated(x, position):
    """One head (K,) at one position, pairs of neighbours as complex numbers."""
    angles = position / 10000.0 ** (torch.arange(0, len(x), 2, dtype=torch.float32) / len(x))  # in float32
    turn = torch.complex(angles.cos().double(), angles.sin().double())
    return torch.view_as_real(torch.view_as_complex(x.view(-1, 2)) * turn).flatten()


def loop(mixer, x, rope):
    """(T, D) -> (T, D), one head and one position at a time."""
    n_heads, n_kv_heads, width = mixer.n_heads, mixer.n_kv_heads, mixer.head_dim
    outputs = [torch.empty(0, dtype=torch.float64)] * len(x)
    for head in range(n_heads):
        group = head // (n_heads // n_kv_heads)
        own, shared = (slice(i * width, (i + 1) * width) for i in (head, group))
        keys: list[torch.Tensor] = []
        us: list[torch.Tensor] = []
        for t, x_t in enumerate(x):
            q, k = mixer.q_proj(x_t)[own], mixer.k_proj(x_t)[shared]
            if rope:
                q, k = rotated(q, t), rotated(k, t)
            u = mixer.v_proj(x_t)[shared]
            if keys:
                found = torch.softmax(torch.stack(keys) @ k / width**0.5, 0) @ torch.stack(us)
                beta = 1 / (1 + torch.exp(-mixer.beta_proj(x_t)[group]))
                u = u - beta * found
            keys.append(k)
            us.append(u)
            o = torch.softmax(torch.stack(keys) @ q / width**0.5, 0) @ torch.stack(us)
            outputs[t] = torch.cat((outputs[t], o))
    return torch.stack([mixer.out_proj(o) for o in outputs])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize(("n_kv_heads", "rope"), [(4, True), (2, True), (1, False)])
def test_equals_a_loop_over_positions_with_all_gradients(n_kv_heads, rope, backend):
    mixer = deltaformer(n_kv_heads=n_kv_heads, rope=rope, backend=backend)
    x = inputs().requires_grad_()
    y, expected = mixer(x), torch.stack([loop(mixer, row, rope) for row in x])
    # The mixer's angles are float32, of which sine and cosine may differ in the last bit.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if rope else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(y, expected, **tolerance)
    cotangent = inputs(seed=2)
    names, wanted = zip(*[("x", x), *mixer.named_parameters()], strict=True)
    ours = torch.autograd.grad((y * cotangent).sum(), wanted)
    theirs = torch.autograd.grad((expected * cotangent).sum(), wanted)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert torch.allclose(a, b, **tolerance), name


def test_without_correction_it_is_attention():
    mixer = deltaformer()
    attention = double(lambda d_model: build_mixer({"name": "attention", "n_heads": 4}, d_model))
    attention.load_state_dict(mixer.state_dict(), strict=False)
    with torch.no_grad():
        mixer.beta_proj.bias.fill_(-1e3)
    torch.testing.assert_close(mixer(inputs()), attention(inputs()), rtol=1e-12, atol=1e-12)


def test_a_value_written_again_under_its_key_is_remembered_once():
    """With beta = 1 what its own key finds is taken back: sharp keys, the same input twice, no sum of both."""
    mixer = deltaformer(rope=False)
    with torch.no_grad():
        mixer.beta_proj.bias.fill_(1e3)
        mixer.k_proj.weight.mul_(100)
    x = inputs(1, 3)
    x[:, 2] = x[:, 0]
    _, state = mixer.extend(x, mixer.init_state(1, 3, dtype=torch.float64))
    u = state.v  # (B, G, T, K)
    torch.testing.assert_close(u[:, :, 2], torch.zeros_like(u[:, :, 2]), rtol=0, atol=1e-6)
    assert u[:, :, 0].abs().min() > 0


def test_gains_are_float32_in_bf16():
    mixer = build_mixer("deltaformer", 32)
    with torch.autocast("cpu", torch.bfloat16):
        beta = mixer.diagnostics(torch.randn(3, 10, 32))["beta"]
    assert beta.dtype == torch.float32
    assert beta.shape == (3, mixer.n_kv_heads, 10)
    assert 0 < beta.min() < beta.max() < 1


def test_options_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="n_kv_heads = 3: it must divide n_heads = 4"):
        build_mixer({"name": "deltaformer", "n_heads": 4, "n_kv_heads": 3}, 32)
