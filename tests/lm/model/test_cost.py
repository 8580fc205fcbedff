"""What a decoder costs, counted without allocating it."""

import pytest

from mixerlab.lm.model.cost import costs, si, size
from mixerlab.lm.recipe.load import load_recipe


def test_groups_sum_to_all_parameters():
    rows = costs(load_recipe("quickstart", ["model.block=transformer", "model.tie_embeddings=false"]))
    numbers = {
        name: int(value.replace(",", "")) for name, value in rows.items() if name.endswith("parameters")
    }
    total = numbers.pop("all parameters")
    assert len(numbers) == 5
    assert all(numbers.values())
    assert sum(numbers.values()) == total


def test_bf16_weights_halve_the_state_of_attention():
    rows = [
        costs(load_recipe("quickstart", ["model.mixer=attention", f"trainer.precision={precision}"]), [512])
        for precision in ("32", "bf16-true")
    ]
    assert [row["decoding state, T = 512"] for row in rows] == [size(4 * 512 * 2 * 128 * b) for b in (4, 2)]


def test_nothing_is_allocated():
    recipe = load_recipe("quickstart", ["model.d_model=65536", "model.mixer=mamba"])
    # Its 100 billion parameters would not fit.
    assert costs(recipe)["d_model"] == "65536"


@pytest.mark.parametrize(
    ("number", "text"), [(999.4, "999"), (999.7, "1k"), (999_600, "1M"), (1_234_567, "1.23M"), (0.5, "0.5")]
)
def test_numbers_keep_three_digits(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (102, "102 B"), (103, "0.10 KiB"), (2**20, "1.00 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_sizes_are_in_the_largest_unit_of_which_there_are_some_tenths(number, text):
    assert size(number) == text


def test_lengths_are_the_recipes_and_sixteen_times_that():
    rows = costs(load_recipe("quickstart"))
    assert [key for key in rows if key.startswith("decoding state")] == [
        "decoding state, T = 256",
        "decoding state, T = 4096",
    ]
