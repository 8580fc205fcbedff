"""Specs of mixers and what becomes of them: Choices checked at any depth, or an error that names the key."""

import sys
import textwrap
from dataclasses import dataclass, make_dataclass
from typing import Any

import pytest

from mixerlab.mixers import (
    MIXERS,
    build_mixer,
    choose_mixers,
    option,
    register_mixer,
    without_segments,
)
from mixerlab.mixers.attention import AttentionConfig
from mixerlab.mixers.identity import Identity
from mixerlab.mixers.mamba2 import Mamba2Config
from mixerlab.mixers.parallel import Parallel, ParallelConfig
from mixerlab.options import Choice, ConfigError, PluginError, plain


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))


def test_a_name_a_mapping_and_a_choice_become_a_choice_with_every_option():
    filled = Choice("attention", AttentionConfig(n_heads=2))
    for spec in ({"name": "attention", "n_heads": 2}, filled):
        assert choose_mixers(spec, "model.mixer", 32) == filled
    assert choose_mixers("attention", "model.mixer") == Choice("attention", AttentionConfig())


def test_a_list_becomes_a_list():
    chosen = choose_mixers(["mamba2", {"name": "attention", "window": 4}], "model.mixer", 32)
    assert chosen == [Choice("mamba2", Mamba2Config()), Choice("attention", AttentionConfig(window=4))]


def test_mixers_inside_mixers_become_choices_at_any_depth():
    spec = {
        "name": "parallel",
        "mixers": [{"name": "selective_attention", "below": {"name": "mamba2", "d_state": 4}}, "attention"],
    }
    chosen = choose_mixers(spec, "model.mixer", 32)
    selective, attention = chosen.options.mixers
    assert selective.options.below == Choice("mamba2", Mamba2Config(d_state=4))
    assert attention == Choice("attention", AttentionConfig())
    assert choose_mixers(chosen, "model.mixer", 32) == chosen
    assert choose_mixers(plain(chosen), "model.mixer", 32) == chosen, "as read from a saved recipe"
    assert spec["mixers"][1] == "attention", "the spec is left as it was"


def test_options_without_a_name_are_those_of_the_default_inner_mixer():
    chosen = choose_mixers({"name": "selective_attention", "below": {"d_state": 4}}, "model.mixer", 32)
    assert chosen.options.below == Choice("mamba2", Mamba2Config(d_state=4))

    @dataclass
    class Config:
        inner: Any = option({"name": "attention", "window": 4}, "a mixer with options", mixers=True)

    register_mixer("holder", Config)(type("Holder", (Identity,), {}))
    chosen = choose_mixers({"name": "holder", "inner": {"n_heads": 2}}, "model.mixer")
    assert chosen.options.inner == Choice("attention", AttentionConfig(n_heads=2, window=4))


VALID = ", ".join(MIXERS.names())


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], f"model.mixer = []: expected at least one mixer; valid: {VALID}"),
        (3, f"model.mixer = 3: expected a mixer's name or a mapping; valid: {VALID}"),
        ({"d_state": 4}, f"model.mixer.name is missing: valid: {VALID}"),
        ("atention", f"model.mixer = 'atention': no such mixer; did you mean 'attention'? valid: {VALID}"),
        (["sessa", []], f"model.mixer[1] = []: expected a mixer's name or a mapping; valid: {VALID}"),
        ({"name": "attention", "n_heads": 0}, "model.mixer.n_heads = 0: expected at least 1"),
        (
            ["sessa", {"name": "attention", "n_heads": 5}],
            "model.mixer[1].n_heads = 5: it must divide model.d_model = 32; nearest: 4",
        ),
        (
            {"name": "selective_attention", "below": {"name": "parallel", "mixers": ["sessa", "mamba9"]}},
            f"model.mixer.below.mixers[1] = 'mamba9': no such mixer; did you mean 'mamba'? valid: {VALID}",
        ),
        # What is wrong with a mixer itself comes before what is wrong inside it.
        (
            {"name": "parallel", "mixers": ["mamba9"]},
            "model.mixer.mixers = ['mamba9']: expected a list of exactly two mixers",
        ),
        (
            {"name": "selective_attention", "below": ["sessa"]},
            "model.mixer.below = ['sessa']: expected one mixer, not a list",
        ),
        (
            {"name": "attention", "rope_base": 10.0},
            "model.mixer.rope_base = 10.0: no such key; it is called rope_theta now",
        ),
        (
            {"name": "mamba2", "head_width": 4},
            "model.mixer.head_width = 4: no such key; it is called head_dim now",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_key(value, message):
    with pytest.raises(ConfigError) as caught:
        choose_mixers(value, "model.mixer", 32)
    assert str(caught.value) == message


def test_without_a_width_it_is_not_asked_whether_options_fit_one():
    odd = {"name": "parallel", "mixers": [{"name": "attention", "n_heads": 5}, "identity"]}
    chosen: Any = choose_mixers(odd, "model.mixer")
    assert chosen.options.mixers[0].options.n_heads == 5
    with pytest.raises(
        ConfigError, match=r"^mixer\.mixers\[0\]\.n_heads = 5: it must divide model.d_model = 32"
    ):
        build_mixer(chosen, 32)
    assert build_mixer(chosen, 40).first.n_heads == 5


@pytest.mark.parametrize(
    "spec",
    [
        "parallel",
        {"name": "parallel"},
        Choice("parallel", ParallelConfig()),
        Choice(
            "parallel", ParallelConfig(mixers=[Choice("attention", AttentionConfig()), {"name": "mamba2"}])
        ),
    ],
)
def test_a_mixer_is_built_from_a_name_a_mapping_or_a_choice(spec):
    mixer = build_mixer(spec, 32, layer_index=1, n_layers=2)
    assert isinstance(mixer, Parallel)
    assert mixer.names == ["attention", "mamba2"]


def test_a_list_is_no_single_mixer():
    with pytest.raises(ConfigError, match=r"^mixer = \['sessa'\]: expected a mixer's name or a mapping"):
        build_mixer(["sessa"], 32)


def test_a_mixer_with_others_inside_may_be_built_without_the_registry():
    inner = [Choice("attention", AttentionConfig()), {"name": "selective_attention", "below": {"d_state": 4}}]
    mixer = Parallel(ParallelConfig(mixers=inner), 32)
    assert mixer.names == ["attention", "selective_attention"]
    assert mixer.second.below.config.d_state == 4


def test_mixers_that_cannot_keep_documents_apart_are_found_at_any_depth():
    @dataclass
    class Config:
        pass

    @register_mixer("together", Config)
    class Together(Identity):
        supports_segments = False

    inner = {"name": "selective_attention", "below": "together"}
    chosen = choose_mixers({"name": "parallel", "mixers": ["together", inner]}, "model.mixer", 32)
    assert without_segments(chosen) == ["together", "together"]
    assert without_segments(choose_mixers(["sessa", inner], "model.mixer", 32)) == ["together"]
    assert without_segments(choose_mixers("parallel", "model.mixer")) == []


@pytest.mark.parametrize("method", ["__post_init__", "problems"])
def test_a_plugins_config_class_that_fails_is_named(method):
    def fail(*_):
        raise KeyError("oops")

    register_mixer("odd", make_dataclass("Config", [], namespace={method: fail}))(
        type("Odd", (Identity,), {})
    )
    for spec, key in (("odd", "mixer"), ({"name": "selective_attention", "below": "odd"}, "mixer.below")):
        with pytest.raises(ConfigError) as caught:
            build_mixer(spec, 32)
        assert str(caught.value) == f"{key} = 'odd': the mixer's config class failed: KeyError: 'oops'"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs a package whose entry points name two mixers, of which its module registers one."""
    (tmp_path / "shifty.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass, make_dataclass
        from mixerlab.mixers import option, register_mixer
        from mixerlab.mixers.identity import Identity

        @dataclass
        class Config:
            size: int = option(3, "a size", min=1)

        @register_mixer("shifty", Config)
        class Shifty(Identity):
            pass
        """)
    )
    info = tmp_path / "shifty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shifty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[mixerlab.mixers]\nshifty = shifty\nmissing = shifty\n")
    monkeypatch.delitem(sys.modules, "shifty", raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("installed")
def test_an_installed_mixer_is_imported_when_it_is_chosen():
    assert "shifty" in MIXERS.names()
    assert "shifty" not in MIXERS.registered()
    spec = {"name": "parallel", "mixers": [{"name": "shifty", "size": 5}, "identity"]}
    assert choose_mixers(spec, "model.mixer", 32).options.mixers[0].options.size == 5
    assert "shifty" in MIXERS.registered()
    with pytest.raises(PluginError, match="registers no mixer of that name"):
        MIXERS.implementation("missing")
    with pytest.raises(ConfigError, match=r"^mixer = 'missing': .*of the installed package 'shifty'"):
        build_mixer("missing", 32)
