"""The table of costs, for one or several mixers side by side."""

from pathlib import Path

import pytest
from mixerlab.lm.config import load_recipe
from mixerlab.lm.describe import describe, main, si, size

from mixerlab.lm.run import build_decoder

QUICKSTART = str(Path(__file__).parents[2] / "recipes" / "quickstart.yaml")


def table(capsys):
    """Quantity -> the columns' values, of what was printed."""
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {row[0]: row[1:] for row in cells if len(row) > 1}


def test_mixers_stand_side_by_side(capsys):
    assert main([QUICKSTART, "--mixers", "sessa", "[mamba2, attention]", "--lengths", "64", "1024"]) == 0
    rows = table(capsys)
    for i, mixer in enumerate(["sessa", "[mamba2, attention]"]):
        recipe = load_recipe(QUICKSTART, [f"model.mixer={mixer}"])
        decoder = build_decoder(recipe, 512)
        assert rows["all parameters"][i] == f"{sum(p.numel() for p in decoder.parameters()):,}"
        states = decoder.init_state(1, 1024)
        assert rows["decoding state, T = 1024"][i] == size(sum(state.nbytes() for state in states))
        assert rows["training FLOPs/token, T = 64"][i] == si(3 * decoder.flops(64) / 64)


def test_groups_sum_to_all_parameters():
    rows = describe(load_recipe(QUICKSTART, ["model.block=transformer", "model.tie_embeddings=false"]))
    numbers = {
        name: int(value.replace(",", "")) for name, value in rows.items() if name.endswith("parameters")
    }
    total = numbers.pop("all parameters")
    assert len(numbers) == 5
    assert all(numbers.values())
    assert sum(numbers.values()) == total


def test_lengths_are_the_recipes_unless_given(capsys):
    assert main([QUICKSTART]) == 0
    assert {"decoding state, T = 256", "decoding state, T = 4096"} <= set(table(capsys))


def test_overrides_may_follow_the_mixers(capsys):
    assert main([QUICKSTART, "--mixers", "mamba", "identity", "model.d_model=64"]) == 0
    rows = table(capsys)
    assert rows["d_model"] == ["64", "64"]
    assert rows["decoding state, T = 256"][1] == "0 B"


def test_mixers_are_compared_at_a_common_size(capsys):
    assert main([QUICKSTART, "model.match_params=5M", "--mixers", "attention", "mamba2"]) == 0
    for number in table(capsys)["all parameters"]:
        assert int(number.replace(",", "")) == pytest.approx(5e6, rel=0.01)


def test_bf16_weights_halve_the_state_of_attention():
    rows = [
        describe(load_recipe(QUICKSTART, ["model.mixer=attention", f"trainer.precision={precision}"]), [512])
        for precision in ("32", "bf16-true")
    ]
    assert [row["decoding state, T = 512"] for row in rows] == [size(4 * 512 * 2 * 128 * b) for b in (4, 2)]


def test_nothing_is_allocated():
    recipe = load_recipe(QUICKSTART, ["model.d_model=65536", "model.mixer=mamba"])
    # Its 100 billion parameters would not fit.
    assert describe(recipe)["d_model"] == "65536"


@pytest.mark.parametrize(
    ("number", "text"), [(999.4, "999"), (999.7, "1k"), (999_600, "1M"), (1_234_567, "1.23M"), (0.5, "0.5")]
)
def test_numbers_keep_three_digits(number, text):
    assert si(number) == text


@pytest.mark.parametrize("arguments", [["--mixers", "mambo"], ["model.n_layers=0"]])
def test_mistakes_get_one_clear_line(arguments, capsys):
    assert main([QUICKSTART, *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: model.")


def test_a_length_must_be_positive(capsys):
    with pytest.raises(SystemExit):
        main([QUICKSTART, "--lengths", "0"])
    assert "'0': expected a number of positions, at least 1" in capsys.readouterr().err
