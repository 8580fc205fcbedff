"""From lists on the command line to the points of a sweep."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixerlab.lm.model.decoder import count_parameters
from mixerlab.lm.recipe.load import load_recipe, to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.sweep.plan import _are_confused, grid_of, plan, split_values
from mixerlab.options import ConfigError

atoms = st.text("abz019.-_ ", min_size=1, max_size=6).map(str.strip).filter(bool)
values = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(inner, max_size=3).map(lambda items: "{" + ", ".join(f"k: {i}" for i in items) + "}")
        | st.lists(atoms, max_size=3).map(lambda items: '"' + ", ".join(items) + ' ]"')
    ),
    max_leaves=6,
)


@given(st.lists(values, min_size=1, max_size=5))
def test_values_are_split_at_the_commas_between_them_alone(items):
    assert split_values(",".join(items)) == items
    assert split_values(" , ".join(items)) == items


@pytest.mark.parametrize(
    ("text", "split"),
    [
        ("sessa,[attention, sessa],mamba2", ["sessa", "[attention, sessa]", "mamba2"]),
        ("{name: sessa, n_heads: 2},attention", ["{name: sessa, n_heads: 2}", "attention"]),
        ("1e-3", ["1e-3"]),
        ("[1,[2,3]],'a,b'", ["[1,[2,3]]", "'a,b'"]),
    ],
)
def test_brackets_and_quotation_marks_hold_a_value_together(text, split):
    assert split_values(text) == split


def recipe_file(folder, text, name="compare.yaml"):
    path = folder / name
    path.write_text(
        "data: {name: mqar, seq_len: 32, n_pairs: 2, vocab_size: 32}\n"
        "model: {d_model: 32, n_layers: 1}\ntrainer: {steps: 4}\n" + text
    )
    return str(path)


def test_the_points_are_the_product_of_the_lists(tmp_path):
    source = recipe_file(tmp_path, "")
    given = [
        "model.mixer=attention,[attention, mamba2]",
        "seed=0,1",
        "optim.lr=1e-3,3e-3",
        "trainer.batch_size=8",
    ]
    planned = plan(source, given)
    expected = itertools.product(["attention", "[attention, mamba2]"], ["0", "1"], ["1e-3", "3e-3"])
    assert [tuple(point.values.values()) for point, _ in planned] == list(expected)
    point, recipe = planned[-1]
    assert list(point.values) == ["model.mixer", "seed", "optim.lr"]
    assert [choice.name for choice in recipe.model.mixer] == ["attention", "mamba2"]
    assert (recipe.seed, recipe.optim.lr, recipe.trainer.batch_size) == (1, 3e-3, 8)
    assert recipe.name == "compare-sweep"
    assert len({recipe.label for _, recipe in planned}) == 8


def test_a_sweep_in_the_recipe_is_the_same_as_on_the_command_line(tmp_path):
    section = """
sweep:
  model.mixer: [attention, {name: sessa, n_heads: 2, feedback: false}, [attention, mamba2]]
  seed: [0, 1]
  optim.lr: [1.0e-3, 1.0e-05]
"""
    by_section = plan(recipe_file(tmp_path, section), [])
    lists = [
        "model.mixer=attention,{name: sessa, n_heads: 2, feedback: false},[attention, mamba2]",
        "seed=0,1",
        "optim.lr=1e-3,1e-5",
    ]
    (tmp_path / "plain").mkdir()
    by_hand = plan(recipe_file(tmp_path / "plain", ""), lists)
    assert [recipe for _, recipe in by_section] == [recipe for _, recipe in by_hand]
    assert len(by_section) == 12


def test_the_command_line_comes_after_the_recipe(tmp_path):
    source = recipe_file(tmp_path, "sweep: {seed: [0, 1], model.mixer: [attention, mamba2]}\n")
    assert grid_of(source, ["seed=3,4,5"])["seed"] == ["3", "4", "5"]
    assert [recipe.seed for _, recipe in plan(source, ["seed=7"])] == [7, 7]


def test_options_behind_a_choice_are_those_of_every_choice(tmp_path):
    given = [
        "data=mqar,induction_heads",
        "data.seq_len=40",
        "model.mixer=attention,sessa",
        "model.mixer.n_heads=2",
    ]
    for _, recipe in plan(recipe_file(tmp_path, ""), given):
        assert (recipe.data.options.seq_len, recipe.model.mixer.options.n_heads) == (40, 2)


def test_a_recipe_with_a_sweep_trains_like_one_without(tmp_path):
    source = recipe_file(tmp_path, "sweep: {seed: [0, 1]}\n")
    assert load_recipe(source).seed == Recipe.seed


def test_a_sweep_is_inherited_from_the_base(tmp_path):
    recipe_file(tmp_path, "sweep: {seed: [0, 1]}\n")
    (tmp_path / "more.yaml").write_text("base: compare.yaml\nmodel: {d_model: 64}\n")
    assert [recipe.model.d_model for _, recipe in plan(str(tmp_path / "more.yaml"), [])] == [64, 64]


def test_parameters_are_matched_at_every_point(tmp_path):
    source = recipe_file(tmp_path, "")
    planned = plan(source, ["model.match_params=60k", "model.mixer=attention,mamba2,sessa", "seed=0,1"])
    assert len({recipe.model.d_model for _, recipe in planned}) > 1
    for point, recipe in planned:
        assert point.parameters == count_parameters(recipe)
        assert point.parameters == pytest.approx(60_000, rel=0.1)


def test_costs_of_a_point_are_those_of_its_decoder(tmp_path):
    """D = 32, one layer of the gated block: FLOPs by hand are in the mixers' tests; here their use."""
    (point, recipe), _ = plan(
        recipe_file(tmp_path, ""), ["seed=0,1", "trainer.batch_size=8", "trainer.accumulate=3"]
    )
    from mixerlab.lm.training.fit import count_steps

    assert (point.step_rows, point.steps) == (24, 4)
    assert count_steps(recipe, 100, 32) == 4
    (by_tokens, recipe), _ = plan(
        recipe_file(tmp_path, ""), ["seed=0,1", "trainer.tokens=10000", "trainer.batch_size=7"]
    )
    assert by_tokens.steps == count_steps(recipe, 0, 32)
    (unknown, _), _ = plan(recipe_file(tmp_path, ""), ["seed=0,1", "trainer.epochs=1"])
    assert unknown.steps is None


def test_no_points_runs_can_be_taken_for_anothers():
    assert _are_confused("data=a", ["data=a-2"])
    assert _are_confused("data=a-2", ["data=a"])
    assert not _are_confused("data=a", ["data=a-b", "data=ab"])


def test_a_cut_label_is_the_same_when_its_recipe_is_read_again(tmp_path):
    lists = ["model.d_model=32,64", "optim.weight_decay=0.1,0.2", "optim.warmup_steps=100,200", "seed=0,1"]
    more = [
        "trainer.batch_size=4,8",
        "optim.final_lr_ratio=0.1,0.2",
        "trainer.val_every=3,4",
        "optim.lr=1e-3,2e-3",
    ]
    for point, recipe in plan(recipe_file(tmp_path, ""), [*lists, *more])[:3]:
        file = tmp_path / "point.yaml"
        file.write_text(to_yaml(recipe))
        assert load_recipe(file).label == point.label
        assert "more" in point.label


def test_points_whose_labels_are_cut_alike_get_names_of_their_own(tmp_path):
    mixers = "[{name: attention, n_heads: 2}],[{name: attention, n_heads: 4}]"
    labels = [point.label for point, _ in plan(recipe_file(tmp_path, ""), [f"model.mixer={mixers}"])]
    assert labels == ["mixer=attention", "mixer=attention-v2"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["mdl.mixer=a,b"], "mdl = .*: no such key; did you mean 'model'"),
        (["model.mixr=attention,sessa"], "model.mixr = 'attention': no such key; did you mean 'mixer'"),
        (["model.mixer=attention,sesa"], "model.mixer = 'sesa': no such mixer; did you mean 'sessa'"),
        (["seed=0,,1"], "seed = '0,,1': an empty value"),
        (["seed=,"], "seed = ',': an empty value"),
        (["seed=0,1,0"], "seed=0: the same run as seed=0; leave one of them out"),
        (["optim.lr=1e-3,0.001"], "optim.lr=0.001: the same run as lr=0.001"),
        (["trainer.steps=3"], "nothing to sweep over; give a key several values, such as seed=0,1"),
        (["strategy.devices=1,2"], "strategy.devices = '1,2': expected one value"),
        (["name=a,b"], "name = 'a,b': expected one value"),
        (["seed=0,1", "resume=auto"], "resume = 'auto': a sweep goes on by itself; leave it out"),
        (["seed", "optim.lr=1,2"], "override 'seed': expected key=value"),
    ],
)
def test_wrong_lists_have_a_message_each(tmp_path, given, said):
    with pytest.raises(ConfigError, match=said) as raised:
        plan(recipe_file(tmp_path, ""), given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("sweep: {seed: []}", r"sweep.seed = \[\]: expected a list of at least one value"),
        ("sweep: {seed: 3}", "sweep.seed = 3: expected a list of at least one value"),
        ("sweep: [1, 2]", r"sweep = \[1, 2\]: expected a mapping of keys to lists"),
        ("sweep: {sede: [1, 2]}", "sede = 1: no such key; did you mean 'seed'"),
    ],
)
def test_wrong_sections_have_a_message_each(tmp_path, section, said):
    with pytest.raises(ConfigError, match=said) as raised:
        plan(recipe_file(tmp_path, section + "\n"), [])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("override", ["seed=0,1", "model.mixer=attention,sessa", "optim.lr=1e-3,3e-3"])
def test_a_list_where_one_value_is_meant_names_the_sweep(override):
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"^{key} = .*; `mixerlab sweep` takes several values") as raised:
        load_recipe("quickstart", [override])
    assert "\n" not in str(raised.value)
