"""Recipes from files, names, Python and the command line: what is merged over what, and what a run is called."""

import math
import sys
import textwrap

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mixerlab.data import DATA
from mixerlab.lm.recipe import load as load_module
from mixerlab.lm.recipe.files import SHIPPED, find_recipe
from mixerlab.lm.recipe.load import (
    LONGEST_LABEL,
    differing_keys,
    label,
    load_recipe,
    load_saved,
    to_yaml,
)
from mixerlab.mixers import MIXERS
from mixerlab.mixers.mamba2 import Mamba2Config
from mixerlab.options import ConfigError, plain
from tiny_runs import ROOT, TINY, train

BAD_FILES = {
    "not YAML": ("model: [unclosed", "bad.yaml: line 2, column 1", "not valid YAML"),
    "not a mapping": ("- a\n- b\n", "bad.yaml", "expected a mapping of sections"),
    "missing base": ("base: nothing.yaml\n", "base = 'nothing.yaml' in bad.yaml", "no such file"),
    "empty": ("# nothing yet\n", "bad.yaml", "it is empty"),
    "base is no path": ("base: 3\n", "base = 3", "path of a recipe"),
    "its own base": ("base: bad.yaml\n", "base", "its own base"),
    "key twice": ("seed: 1\nseed: 2\n", "bad.yaml: line 2", "duplicate key"),
    "binary": ("\x00\x01", "bad.yaml", "not valid YAML"),
    "mixer without a name": (
        "base: good.yaml\nmodel: {mixer: [{n_heads: 2}]}\n",
        "model.mixer[0].name is missing",
        "valid: attention",
    ),
    "section is a list": ("base: good.yaml\noptim: [1, 2]\n", "optim = [1, 2]", "expected a mapping"),
    "mixer is a number": (
        "base: good.yaml\nmodel: {mixer: 3}\n",
        "model.mixer = 3",
        "a mixer's name or a mapping",
    ),
}


@pytest.mark.parametrize(("text", "where", "hint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_wrong_recipe_file_gets_one_clear_line(folder, capsys, text, where, hint):
    (folder / "bad.yaml").write_text(text)
    assert train("bad.yaml") == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert where in err
    assert hint in err


def test_a_missing_recipe_names_the_nearest(folder, capsys):
    assert train("god.yaml") == 2
    assert "did you mean good.yaml?" in capsys.readouterr().err


def test_layers_are_merged_in_order(folder):
    (folder / "base.yaml").write_text("base: good.yaml\nseed: 5\noptim: {lr: 0.5, weight_decay: 0.25}\n")
    (folder / "top.yaml").write_text("base: base.yaml\noptim: {lr: 0.125}\n")
    recipe = load_recipe("top.yaml", ["optim.warmup_steps=7"])
    assert recipe.name == "top"
    assert recipe.seed == 5
    assert (recipe.optim.lr, recipe.optim.weight_decay, recipe.optim.warmup_steps) == (0.125, 0.25, 7)
    assert recipe.optim.eps == 1e-8


MAMBA2 = {"name": "mamba2", **vars(Mamba2Config()), "dt_limit": [0.0, math.inf]}
MAMBA = {"expand": 2, "d_conv": 4, "dt_rank": None, "conv_bias": True, "bias": False, "backend": "auto"}


@pytest.mark.parametrize(
    ("recipe", "overrides", "expected"),
    [
        ("sessa", ["model.mixer=attention"], {"name": "attention", "n_heads": None}),
        ("{name: sessa, n_heads: 4}", ["model.mixer=attention"], {"name": "attention", "n_heads": None}),
        ("{name: sessa, n_heads: 4}", ["model.mixer.name=attention"], {"name": "attention", "n_heads": None}),
        (
            "{name: sessa, n_heads: 4}",
            ["model.mixer.rope=false"],
            {"name": "sessa", "n_heads": 4, "rope": False},
        ),
        ("sessa", ["model.mixer.n_heads=2"], {"name": "sessa", "n_heads": 2}),
        ("[sessa, attention]", ["model.mixer=identity"], {"name": "identity"}),
        ("{name: sessa, n_heads: 4}", ["model.mixer=sessa"], {"name": "sessa", "n_heads": None}),
        (
            "{name: selective_attention, below: mamba}",
            ["model.mixer.below.d_state=3"],
            {"below": {"name": "mamba", "d_state": 3, **MAMBA}},
        ),
        (
            "selective_attention",  # whose mixer below is mamba2 where none is named
            ["model.mixer.below.d_state=3"],
            {"below": MAMBA2 | {"d_state": 3}},
        ),
        (
            "[{name: selective_attention, below: {d_state: 3}}]",
            [],
            [{"below": MAMBA2 | {"d_state": 3}}],
        ),
        (
            "{name: selective_attention, below: {name: attention, window: 9}}",
            ["model.mixer.below={name: mamba, d_state: 16}"],
            {"below": {"name": "mamba", "d_state": 16, **MAMBA}},
        ),
        (
            "parallel",
            ["model.mixer.mixers=[identity, {name: mamba, d_state: 5}]"],
            {"mixers": [{"name": "identity"}, {"name": "mamba", "d_state": 5, **MAMBA}]},
        ),
    ],
)
def test_naming_another_mixer_replaces_the_section(folder, recipe, overrides, expected):
    (folder / "r.yaml").write_text(f"base: good.yaml\nmodel: {{mixer: {recipe}}}\n")
    mixer = plain(load_recipe("r.yaml", overrides).model.mixer)
    if isinstance(mixer, list):
        (mixer,), (expected,) = mixer, expected
    assert {key: mixer[key] for key in expected} == expected


def test_another_horizon_replaces_the_recipes(folder):
    trainer = load_recipe("good.yaml", ["trainer.tokens=1e6"]).trainer
    assert (trainer.steps, trainer.epochs, trainer.tokens) == (None, None, 1e6)


@settings(max_examples=20, deadline=None)
@given(
    lr=st.floats(1e-6, 1, allow_nan=False),
    layers=st.integers(1, 50),
    mixer=st.sampled_from(
        [
            "sessa",
            "[identity, {name: attention, window: 9}]",
            "{name: sessa, feedback: false}",
            "{name: parallel, mixers: [{name: selective_attention, window: 9}, mamba]}",
        ]
    ),
)
def test_the_resolved_recipe_is_a_recipe_for_the_same(tmp_path_factory, lr, layers, mixer):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "a.yaml").write_text(
        f"optim: {{lr: {lr!r}}}\nmodel: {{n_layers: {layers}, mixer: {mixer}}}\ntrainer: {{steps: 3}}\n"
    )
    recipe = load_recipe(folder / "a.yaml")
    (folder / "b.yaml").write_text(to_yaml(recipe))
    assert plain(load_recipe(folder / "b.yaml")) == plain(recipe)


def test_print_config_prints_every_key(folder, capsys):
    assert train("good.yaml", "--print-config", "model.mixer=identity") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == plain(load_recipe("good.yaml", ["model.mixer=identity"]))


def test_plugins_register_before_the_recipe_is_checked(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))
    (folder / "my_plugin.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from mixerlab.mixers import option, register_mixer
        from mixerlab.mixers.identity import Identity

        @dataclass
        class Config:
            width: int = option(3, "width")

        @register_mixer("mine", Config)
        class Mine(Identity):
            pass
        """)
    )
    recipe = load_recipe("good.yaml", ["plugins=[my_plugin]", "model.mixer=mine"])
    assert plain(recipe.model.mixer) == {"name": "mine", "width": 3}


def test_a_plugin_that_exits_is_named(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "leaving_plugin.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(ConfigError, match="'leaving_plugin' failed: SystemExit: 3"):
        load_recipe("good.yaml", ["plugins=[leaving_plugin]"])


def test_a_plugin_cannot_replace_a_mixer(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))
    (folder / "replacing_plugin.py").write_text(
        "from mixerlab.mixers.attention import AttentionConfig, Attention as Theirs\n"
        "from mixerlab.mixers import register_mixer\n"
        "@register_mixer('attention', AttentionConfig)\n"
        "class Attention(Theirs): pass\n"
    )
    with pytest.raises(ConfigError, match="a mixer named 'attention' is registered already"):
        load_recipe("good.yaml", ["plugins=[replacing_plugin]"])


def test_a_broken_plugin_is_named(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "broken_plugin.py").write_text("raise RuntimeError('out of order')")
    with pytest.raises(ConfigError, match=r"broken_plugin.*RuntimeError: out of order"):
        load_recipe("good.yaml", ["plugins=[broken_plugin]"])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ("a: Nowhere = 3", "has a type that is not defined: name 'Nowhere' is not defined"),
        ("a: int", "has no default for a"),
        ("a: int = 3", "has no help for a; expected option(default, 'help')"),
    ],
)
def test_a_plugins_config_class_is_checked_when_it_registers(folder, monkeypatch, fields, reason):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "odd_plugin", raising=False)
    write_plugin(folder / "odd_plugin.py", fields)
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load_recipe("good.yaml", ["plugins=[odd_plugin]"])
    assert "'odd_plugin' failed: TypeError: the config class of mixer 'odd'" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.parametrize("method", ["__post_init__(self)", "problems(self, d_model)"])
def test_a_plugins_config_class_that_fails_is_named(folder, monkeypatch, method):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))
    monkeypatch.delitem(sys.modules, "failing_plugin", raising=False)
    write_plugin(folder / "failing_plugin.py", f"def {method}: raise KeyError('oops')")
    expected = r"^model.mixer = 'odd': the mixer's config class failed: KeyError: 'oops'$"
    with pytest.raises(ConfigError, match=expected):
        load_recipe("good.yaml", ["plugins=[failing_plugin]", "model.mixer=odd"])


def write_plugin(path, body):
    """A module that registers the mixer `odd`, whose config class has this body."""
    path.write_text(
        textwrap.dedent(f"""
        from __future__ import annotations
        from dataclasses import dataclass
        from mixerlab.mixers import register_mixer
        from mixerlab.mixers.identity import Identity

        @dataclass
        class OddConfig:
            {body}

        @register_mixer("odd", OddConfig)
        class Odd(Identity):
            pass
        """)
    )


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path):
    assert load_recipe(path).name == path.stem


def test_recipes_that_come_with_the_package_are_the_repositorys():
    assert {p.name for p in SHIPPED.glob("*.yaml")} == {p.name for p in (ROOT / "recipes").glob("*.yaml")}


def test_a_recipe_that_comes_with_the_package_is_found_by_its_name(folder):
    assert (
        load_recipe("quickstart")
        == load_recipe("quickstart.yaml")
        == load_recipe(SHIPPED / "quickstart.yaml")
    )
    with pytest.raises(ConfigError, match=r"recipe quickstrat: no such file; did you mean quickstart\?"):
        load_recipe("quickstrat")


def test_a_file_here_comes_before_one_in_the_folder_and_that_before_a_shipped_one(folder):
    (folder / "inner").mkdir()
    inner = folder / "inner" / "quickstart.yaml"
    assert find_recipe("quickstart.yaml", inner.parent) == SHIPPED / "quickstart.yaml"
    inner.touch()
    assert find_recipe("quickstart.yaml", inner.parent) == inner
    (folder / "quickstart.yaml").touch()
    assert find_recipe("quickstart.yaml", inner.parent).resolve() == folder / "quickstart.yaml"


def test_sections_from_python_are_as_on_the_command_line(folder):
    given = {"model": {"mixer": "attention", "n_layers": 2}, "optim": {"betas": (0.8, 0.9)}, "seed": 3}
    texts = ["model.mixer=attention", "model.n_layers=2", "optim.betas=[0.8,0.9]", "seed=3"]
    assert load_recipe("good.yaml", **given) == load_recipe("good.yaml", texts)
    with pytest.raises(ConfigError, match=r"optim\.lrr = 1: no such key; did you mean 'lr'"):
        load_recipe("good.yaml", optim={"lrr": 1})
    with pytest.raises(
        ConfigError, match=r"trainer\.steps = 3 and trainer\.epochs = 2: expected exactly one"
    ):
        load_recipe("good.yaml", ["trainer.steps=3"], trainer={"epochs": 2})


def test_a_loaded_recipe_can_be_changed_and_stays_as_it_was(folder):
    recipe = load_recipe("good.yaml", ["model.mixer={name: sessa, n_heads: 4}"])
    before = plain(recipe)
    assert load_recipe(recipe) == recipe
    assert plain(load_recipe(recipe, model={"mixer": "attention"}).model.mixer)["n_heads"] is None
    assert load_recipe(recipe, trainer={"tokens": 1e6}).trainer.steps is None
    assert plain(recipe) == before


def test_loading_solves_for_no_width(folder):
    assert load_recipe("good.yaml", ["model.match_params=1M"]).model.match_params == "1M"
    matched = load_recipe("good.yaml", ["model.match=quickstart"]).model
    assert matched.match == str(SHIPPED / "quickstart.yaml")
    assert not matched.is_sized


def test_the_yaml_of_a_recipe_does_not_resume(folder):
    assert yaml.safe_load(to_yaml(load_recipe("good.yaml", ["resume=auto"])))["resume"] is None


def test_a_recipe_of_an_older_version_is_read_with_the_names_of_today(folder):
    (folder / "recipe.yaml").write_text(
        "data: {name: text, source: files, files: [gone.txt]}\n"
        "trainer: {steps: 3}\n"
        "model: {block: transformer, mlp_width: 64, mixer: [{name: mamba2, head_width: 8}, "
        "{name: parallel, mixers: [{name: attention, rope_base: 500.0}, {name: mamba2, head_width: 16}]}]}\n"
    )
    model = load_saved(folder / "recipe.yaml").model
    assert model.mlp_dim == 64
    assert isinstance(model.mixer, list)
    first, second = model.mixer
    assert first.options.head_dim == 8
    attention, mamba2 = second.options.mixers
    assert attention.options.rope_theta == 500.0
    assert mamba2.options.head_dim == 16
    with pytest.raises(ConfigError, match=r"model\.mlp_width = 64: no such key; it is called mlp_dim now"):
        load_recipe(folder / "recipe.yaml")


def test_a_recipe_that_is_not_there_is_named(folder):
    with pytest.raises(ConfigError, match=r"run/recipe\.yaml: no such file"):
        load_saved(folder / "run" / "recipe.yaml")


def test_differences_are_the_leaves():
    a = {"seed": 1, "model": {"mixer": {"name": "sessa", "n_heads": 2}, "d_model": 8}, "plugins": []}
    b = {"seed": 1, "model": {"mixer": {"name": "identity"}, "d_model": 8}, "plugins": ["x"]}
    assert list(differing_keys(a, a)) == []
    assert list(differing_keys(a, b)) == [
        ("model.mixer.name", "sessa", "identity"),
        ("model.mixer.n_heads", 2, None),
        ("plugins", [], ["x"]),
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], None),
        (["model.mixer=[mamba2,sessa]", "optim.lr=3e-3"], "mixer=mamba2+sessa-lr=0.003"),
        (["model.mixer=attention"], "mixer=attention"),
        (["model.mixer.name=attention"], "mixer=attention"),
        (["model.mixer={name: attention, window: 9}"], "mixer=attention-window=9"),
        (["model.mixer=[{name: attention, window: 9}, sessa]"], "mixer=attention+sessa"),
        (["trainer.tokens=2e9", "seed=1"], "tokens=2e+09-seed=1"),
        (["model.tie_embeddings=false", "optim.grad_clip=null"], "tie_embeddings=false-grad_clip=null"),
        (["data.files=corpus.txt"], "files=corpus.txt"),
        (["data.files=/somewhere/else/a b.txt"], "files=a_b.txt"),
        (["seed=1", "seed=2"], "seed=2"),
        (["name=other", "resume=auto", "plugins=[math]", "logging.every=2", "logging.dir=/tmp/x"], None),
        (["strategy=fsdp", "strategy.devices=2", "data.cache_dir=c", "trainer.num_workers=2"], None),
        (["trainer.max_time=1h", "strategy.timeout=5"], None),
        (["label=mine", "seed=1"], "mine"),
    ],
)
def test_the_label_says_what_the_command_line_changes(folder, overrides, expected):
    assert load_recipe("good.yaml", overrides, check_data=False).label == expected


def test_the_label_of_a_recipe_stands_before_what_is_changed(folder):
    (folder / "named.yaml").write_text("base: good.yaml\nlabel: wide\nmodel: {d_model: 64}\n")
    assert load_recipe("named.yaml").label == "wide"
    assert load_recipe("named.yaml", ["seed=1"], model={"n_layers": 2}).label == "wide-seed=1-n_layers=2"


def test_a_long_label_is_shortened_and_says_how_much_it_leaves_out():
    changes = {f"option_{i:02}": "x" * 60 for i in range(9)}
    short = label(changes)
    assert short.startswith(f"option_00={'x' * 32}-option_01={'x' * 32}")
    assert short.endswith("-and-7-more")
    assert len(short) <= LONGEST_LABEL + len("-and-9-more")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True),
        st.none()
        | st.booleans()
        | st.floats(allow_nan=False)
        | st.text()
        | st.lists(st.text() | st.integers() | st.just({"name": "sessa"}))
        | st.dictionaries(st.sampled_from(["name", "lr", "window"]), st.text() | st.integers()),
    )
)
def test_any_label_is_the_name_of_a_folder(changes):
    made = label(changes)
    if made is not None:
        assert load_module.Path(made).name == made
        assert not any(character.isspace() or not character.isprintable() for character in made)
        assert len(made) <= LONGEST_LABEL + len("--and-99-more")


def test_a_label_with_a_slash_is_refused(folder):
    with pytest.raises(ConfigError, match="label = 'a/b': expected the name of a folder, without slashes"):
        load_recipe("good.yaml", ["label=a/b"])


def test_what_is_changed_again_is_replaced_in_the_label():
    once = load_recipe(TINY, seed=1, model={"mixer": "attention"})
    assert load_recipe(once, seed=2, optim={"lr": 1e-5}).label == "seed=2-mixer=attention-lr=1e-05"
    assert load_recipe(once, label="mine").label == "mine"
    assert load_recipe(load_recipe(once, label="mine"), seed=3).label == "mine-seed=3"


def test_numbers_of_numpy_and_paths_are_taken_from_python(tmp_path):
    rate, steps = np.logspace(-3, -2, 2)[0], np.int64(7)
    recipe = load_recipe(TINY, optim={"lr": rate}, trainer={"steps": steps}, logging={"dir": tmp_path})
    assert (recipe.optim.lr, recipe.trainer.steps, recipe.logging.dir) == (1e-3, 7, str(tmp_path))
    assert load_recipe(TINY, "seed=4").seed == 4


def test_a_section_cannot_be_taken_away():
    for section in ("model", "data", "trainer"):
        with pytest.raises(ConfigError, match=f"{section} = null: expected options of that section"):
            load_recipe(TINY, [f"{section}="])


def test_a_recipe_may_build_on_one_that_comes_with_mixerlab(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: quickstart\nseed: 5\n")
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.seed, recipe.model.d_model) == (5, load_recipe("quickstart").model.d_model)


def test_a_data_plugins_config_class_that_fails_is_named(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(DATA, "_entries", dict(DATA._entries))
    (folder / "failing_data.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass
        from mixerlab.data import DataModule, register_data

        @dataclass
        class OddConfig:
            def problems(self): raise KeyError("oops")

        @register_data("odd", OddConfig)
        class Odd(DataModule): pass
        """)
    )
    with pytest.raises(
        ConfigError, match=r"^data = 'odd': the data module's config class failed: KeyError: 'oops'$"
    ):
        load_recipe("good.yaml", ["plugins=[failing_data]", "data=odd"])


@pytest.mark.parametrize("text", ["${oc.env:HOME}", r"\${oc.env:HOME}", r"\\${a", "a${b", r"\$", "$${x}"])
def test_text_that_looks_like_an_interpolation_stays_text(folder, text):
    recipe = load_recipe("good.yaml", logging={"sample_prompt": text})
    assert recipe.logging.sample_prompt == text
    (folder / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe("again.yaml").logging.sample_prompt == text
    (folder / "run" / "checkpoints").mkdir(parents=True)
    (folder / "run" / "recipe.yaml").write_text(to_yaml(recipe))
    assert load_saved(folder / "run" / "recipe.yaml").logging.sample_prompt == text
    assert load_recipe(folder / "run" / "recipe.yaml").logging.sample_prompt == text
