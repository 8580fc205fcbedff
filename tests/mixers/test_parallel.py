"""Two mixers side by side: the average of both after their norms."""

import pytest
import torch

from mixerlab.mixers import MIXERS, build_mixer, choose_mixers, register_mixer, without_segments
from mixerlab.mixers.identity import Identity, IdentityConfig
from mixerlab.mixers.mixer import Mixer
from mixerlab.mixers.testing import double, inputs


def parallel(*mixers):
    return double(lambda d_model: build_mixer({"name": "parallel", "mixers": list(mixers)}, d_model))


def test_equals_the_average_of_both_normed():
    mixer = parallel("attention", {"name": "mamba", "d_state": 4})
    x = inputs()
    expected = 0.0
    for branch, norm in ((mixer.first, mixer.first_norm), (mixer.second, mixer.second_norm)):
        y = branch(x)
        expected = expected + norm.weight * y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() / 2
    torch.testing.assert_close(mixer(x), expected, rtol=1e-12, atol=1e-12)


def test_diagnostics_watch_both_branches_by_name():
    x = inputs()
    mixer = parallel("sessa", "mamba")
    values = mixer.diagnostics(x)
    assert set(values) == {"sessa/rms", "sessa/gamma", "sessa/feedback_entropy", "mamba/rms"}
    rms = mixer.second(x).square().mean(-1).sqrt()
    torch.testing.assert_close(values["mamba/rms"], rms.float())
    twice = parallel("sessa", {"name": "sessa", "feedback": False}).diagnostics(x)
    assert {"sessa_0/gamma", "sessa_0/rms", "sessa_1/rms"} <= set(twice)


@pytest.mark.parametrize("mixers", [[], ["attention"], ["mamba"] * 3, "attention"])
def test_other_than_two_mixers_are_refused(mixers):
    with pytest.raises(ValueError, match="expected a list of exactly two mixers"):
        build_mixer({"name": "parallel", "mixers": mixers}, 32)


def test_a_mapping_is_no_list_of_two():
    with pytest.raises(
        ValueError, match=r"^mixer.mixers = .*: expected a list, each item a name or a mapping$"
    ):
        build_mixer({"name": "parallel", "mixers": {"name": "attention"}}, 32)


def test_what_is_wrong_inside_is_named():
    for inner, message in (
        ("mamba9", r"mixer.mixers\[1\] = 'mamba9': no such mixer; did you mean 'mamba"),
        (
            {"name": "attention", "n_hed": 2},
            r"mixer.mixers\[1\].n_hed = 2: no such key; did you mean 'n_heads'",
        ),
        ({"name": "attention", "n_heads": 7}, r"mixer.mixers\[1\].n_heads = 7: it must divide"),
    ):
        with pytest.raises(ValueError, match=message):
            build_mixer({"name": "parallel", "mixers": ["identity", inner]}, 32)


@pytest.fixture
def together(monkeypatch):
    """A registered mixer named `together` that cannot keep documents apart."""
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))

    @register_mixer("together", IdentityConfig)
    class Together(Identity):
        supports_segments = False

        def forward(self, x, segment_ids=None):
            self.refuse_segments(segment_ids)
            return x


@pytest.mark.usefixtures("together")
def test_segments_are_supported_if_every_mixer_inside_does():
    nested = {
        "name": "parallel",
        "mixers": ["attention", {"name": "parallel", "mixers": ["together", "mamba"]}],
    }
    below = {"name": "selective_attention", "below": nested}
    segment_ids = torch.zeros(2, 21, dtype=torch.int64)
    for spec in (nested, below):
        assert without_segments(choose_mixers(spec, "mixer")) == ["together"]
        mixer: Mixer = build_mixer(spec, 32).double()
        assert not mixer.supports_segments
        with pytest.raises(ValueError, match="Together cannot keep packed documents apart"):
            mixer(inputs(), segment_ids)
    inside = {"name": "selective_attention", "below": "parallel"}
    for able in ({"name": "parallel"}, {"name": "selective_attention"}, inside):
        assert without_segments(choose_mixers(able, "mixer")) == []
        assert build_mixer(able, 32).supports_segments
