"""The table of costs, for one or several mixers side by side."""

import shutil

import pytest

from mixerlab.__main__ import main
from mixerlab.lm.model.cost import si, size
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.load import load_recipe
from tiny_runs import ROOT

QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")


def table(capsys):
    """Quantity -> the columns' values, of what was printed."""
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


def test_mixers_stand_side_by_side(capsys):
    assert (
        main(["describe", QUICKSTART, "--mixers", "sessa", "[mamba2, attention]", "--lengths", "64", "1024"])
        == 0
    )
    rows = table(capsys)
    for i, mixer in enumerate(["sessa", "[mamba2, attention]"]):
        recipe = load_recipe(QUICKSTART, [f"model.mixer={mixer}"])
        decoder = build_decoder(recipe, 512)
        assert rows["all parameters"][i] == f"{sum(p.numel() for p in decoder.parameters()):,}"
        states = decoder.init_state(1, 1024)
        assert rows["decoding state, T = 1024"][i] == size(sum(state.nbytes() for state in states))
        assert rows["training FLOPs/token, T = 64"][i] == si(3 * decoder.flops(64) / 64)


def test_lengths_are_the_recipes_unless_given(capsys):
    assert main(["describe", QUICKSTART]) == 0
    assert {"decoding state, T = 256", "decoding state, T = 4096"} <= set(table(capsys))


def test_overrides_may_follow_the_mixers(capsys):
    assert main(["describe", QUICKSTART, "--mixers", "mamba", "identity", "model.d_model=64"]) == 0
    rows = table(capsys)
    assert rows["d_model"] == ["64", "64"]
    assert rows["decoding state, T = 256"][1] == "0 B"


def test_overrides_may_follow_the_lengths(capsys):
    assert main(["describe", QUICKSTART, "--lengths", "10", "model.d_model=64"]) == 0
    rows = table(capsys)
    assert rows["d_model"] == ["64"]
    assert "decoding state, T = 10" in rows


def test_brackets_in_a_path_are_printed_as_they_are(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(QUICKSTART, "[bold]:x:.yaml")
    assert main(["describe", "[bold]:x:.yaml"]) == 0
    assert "[bold]:x:.yaml" in capsys.readouterr().out


def test_mixers_are_compared_at_a_common_size(capsys):
    assert main(["describe", QUICKSTART, "model.match_params=5M", "--mixers", "attention", "mamba2"]) == 0
    for number in table(capsys)["all parameters"]:
        assert int(number.replace(",", "")) == pytest.approx(5e6, rel=0.01)


@pytest.mark.parametrize("arguments", [["--mixers", "mambo"], ["model.n_layers=0"]])
def test_mistakes_get_one_clear_line(arguments, capsys):
    assert main(["describe", QUICKSTART, *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: model.")


@pytest.mark.parametrize(("length", "said"), [("0", "0: expected at least 1"), ("x", "invalid literal")])
def test_a_length_must_be_a_positive_number(capsys, length, said):
    with pytest.raises(SystemExit) as left:
        main(["describe", QUICKSTART, "--lengths", length])
    assert left.value.code == 2
    assert said in capsys.readouterr().err


def test_a_recipe_that_comes_with_mixerlab_needs_its_name_alone(capsys):
    assert main(["describe", "quickstart"]) == 0
    assert table(capsys)["d_model"] == ["128"]
