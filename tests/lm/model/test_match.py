"""Widths for a wanted number of parameters."""

import logging
import subprocess
import sys

import pytest

from mixerlab.lm.model.decoder import count_parameters
from mixerlab.lm.model.match import sized
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.mixers import MIXERS
from mixerlab.options import ConfigError
from tiny_runs import ROOT

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"


def load(*overrides, recipe=QUICKSTART):
    return sized(load_recipe(recipe, overrides))


@pytest.mark.parametrize("budget", [3e6, 1e7, 1.3e8])
@pytest.mark.parametrize("block", ["gated", "transformer"])
@pytest.mark.parametrize("mixer", [*MIXERS.registered(), "[mamba2, sessa]"])
def test_any_mixer_comes_within_a_percent_of_the_budget(mixer, block, budget):
    # With a head of its own, no width of the gated block with `parallel` is within a percent of 3M.
    tied = "model.tie_embeddings=true"
    recipe = load(f"model.mixer={mixer}", f"model.block={block}", f"model.match_params={budget}", tied)
    assert count_parameters(recipe) == pytest.approx(budget, rel=0.01)
    assert recipe.model.match_params is None
    if block == "transformer":
        assert recipe.model.mlp_dim is not None
        assert recipe.model.mlp_dim / recipe.model.d_model == pytest.approx(8 / 3, rel=0.13)


@pytest.mark.parametrize(
    ("text", "number"), [("10M", 1e7), ("10m", 1e7), ("1.5B", 1.5e9), ("2500k", 2.5e6), ("3000000", 3e6)]
)
def test_budgets_have_units(text, number):
    recipe = load(f"model.match_params={text}", "model.mixer=mamba")
    assert count_parameters(recipe) == pytest.approx(number, rel=0.01)


def test_the_roundest_width_is_taken():
    # 520 has 10.02M parameters, 519 and 521 (were they even) would be no further off.
    assert load("model.match_params=10M").model.d_model % 8 == 0
    assert load("model.match_params=130M").model.d_model % 16 == 0


def test_given_heads_are_kept_and_what_is_missed_is_said(caplog):
    with caplog.at_level(logging.INFO, logger="mixerlab.match"):
        recipe = load(
            "model.mixer={name: sessa, n_heads: 6}", "model.match_params=10M", "model.tie_embeddings=true"
        )
    assert recipe.model.d_model % 12 == 0  # even heads, for the rotary positions
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert (
        f"d_model = {recipe.model.d_model} gives {count_parameters(recipe):,} parameters, -1.27%"
        in record.message
    )


def test_a_recipe_can_be_matched(caplog):
    with caplog.at_level(logging.INFO, logger="mixerlab.match"):
        recipe = load(f"model.match={QUICKSTART}", "model.mixer=attention")
    assert count_parameters(recipe) == pytest.approx(count_parameters(load()), rel=0.01)
    assert f"d_model = {recipe.model.d_model} gives" in caplog.text


def test_a_recipe_that_matches_another_cannot_be_matched(tmp_path):
    recipe = tmp_path / "self.yaml"
    recipe.write_text(f"base: {QUICKSTART}\nmodel: {{match: self.yaml}}\n")
    with pytest.raises(ConfigError, match=r"self\.yaml': that recipe matches another itself"):
        load(recipe=recipe)


def test_a_recipe_with_a_budget_can_be_matched(tmp_path):
    recipe = tmp_path / "sized.yaml"
    recipe.write_text(f"base: {QUICKSTART}\nmodel: {{match_params: 3M, mixer: attention}}\n")
    matched = load(f"model.match={recipe}", "model.mixer=mamba2")
    assert count_parameters(matched) == pytest.approx(3e6, rel=0.02)


@pytest.mark.parametrize("budget", [735_807, 1_644_026, 449_980, 2_345_678])
@pytest.mark.parametrize("mlp", ["gated", "transformer, no MLP"])
def test_head_widths_that_vary_with_the_width_hide_no_solution(budget, mlp):
    # Of odd widths Mamba-2 has heads 2 wide and so more parameters: the count is not monotone.
    blocks = {"gated": [], "transformer, no MLP": ["model.block=transformer", "model.mlp=none"]}
    tied = "model.tie_embeddings=true"  # with which these budgets have a solution
    recipe = load("model.mixer=mamba2", f"model.match_params={budget}", tied, *blocks[mlp])
    assert count_parameters(recipe) == pytest.approx(budget, rel=0.01)


@pytest.mark.parametrize("name", ["quickstart.yaml", "quickstart"])
def test_a_recipe_beside_this_one_can_be_matched(name):
    recipe = load(f"model.match={name}", "model.mixer=mamba")
    assert count_parameters(recipe) == pytest.approx(count_parameters(load()), rel=0.01)


def test_the_printed_config_has_the_width_and_repeats_the_run(tmp_path):
    command = [
        sys.executable,
        "train.py",
        str(QUICKSTART),
        "--print-config",
        "model.match_params=1M",
        "model.mixer=mamba",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "model.match_params = 1M: d_model = " in done.stderr
    (tmp_path / "whole.yaml").write_text(done.stdout)
    recipe = load_recipe(tmp_path / "whole.yaml")
    assert recipe.model == load("model.match_params=1M", "model.mixer=mamba").model


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.match_params=1000"], "model.match_params = 1000: d_model = 2 gives"),
        (
            ["model.match_params=ten"],
            "model.match_params = 'ten': expected a number of parameters, such as 10M",
        ),
        (["model.match_params=-5"], "model.match_params = -5: expected above 0"),
        (["model.match_params=0k"], "model.match_params = '0k': expected a number of parameters"),
        (["model.match_params=1M", f"model.match={QUICKSTART}"], "expected at most one of model.match and"),
        (["model.match=quickstar.yaml"], "recipe quickstar.yaml: no such file"),
        (["model.match_params=.inf"], "model.match_params = inf: expected above 0 and below 1"),
        (["model.match_params=99999999999M"], "expected at least 1 and below 10000B parameters"),
        (
            ["model.match_params=1M", "model.mixer={name: attention, n_heads: 4, n_kv_heads: 3}"],
            "model.mixer.n_kv_heads = 3: it must divide n_heads = 4; valid: 1, 2, 4",
        ),
        (
            ["model.match_params=1M", "model.mixer={name: parallel, mixers: [attention]}"],
            "expected a list of exactly two mixers",
        ),
    ],
)
def test_what_cannot_be_matched_gets_one_clear_line(overrides, message):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load(*overrides)
    assert message in str(caught.value)


def test_a_recipe_with_a_width_is_left_as_it_is():
    recipe = load_recipe(QUICKSTART)
    assert sized(recipe) is recipe


def test_the_recipe_that_is_sized_stays_as_it_was():
    recipe = load_recipe(QUICKSTART, ["model.match_params=1M"])
    assert sized(recipe).model.d_model != recipe.model.d_model
    assert recipe.model.match_params == "1M"
