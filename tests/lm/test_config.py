"""Recipes: what is merged over what, and what a wrong one is told."""

import math
import sys
import textwrap
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mixerlab.lm.config import ConfigError, load_recipe, to_dict, to_yaml

import train
from mixerlab.mixers import registry
from mixerlab.mixers.identity import Identity, IdentityConfig
from mixerlab.mixers.mamba2 import Mamba2Config

ROOT = Path(__file__).parents[2]
GOOD = "data: {name: text, source: files, files: [corpus.txt]}\ntrainer: {steps: 3}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with good.yaml and a corpus, as the working directory."""
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "corpus.txt").write_text("hello\n" * 100)
    (tmp_path / "short.txt").write_text("hello\nyou\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes("déjà vu".encode("latin-1") * 50)
    (tmp_path / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the cache lies
    monkeypatch.chdir(tmp_path)
    return tmp_path


BAD = {
    "typo in a section": (["optm.lr=1"], "optm = {'lr': 1}: no such key", "did you mean 'optim'?"),
    "typo in a key": (["optim.learning_rate=1"], "optim.learning_rate = 1: no such key", "lr"),
    "near typo": (["trainer.batch_sise=4"], "trainer.batch_sise = 4", "did you mean 'batch_size'?"),
    "typo at the top": (["sede=1"], "sede = 1: no such key", "did you mean 'seed'?"),
    "text for a number": (["optim.lr=fast"], "optim.lr = 'fast'", "expected a number"),
    "fraction for an integer": (["model.n_layers=2.5"], "model.n_layers = 2.5", "expected an integer"),
    "number for a switch": (["strategy.compile=1"], "strategy.compile = 1", "expected true or false"),
    "switch for an integer": (
        ["trainer.batch_size=true"],
        "trainer.batch_size = true",
        "expected an integer",
    ),
    "scalar for a section": (["optim=adam"], "optim = 'adam'", "expected a mapping with keys lr,"),
    "list of the wrong length": (["optim.betas=[0.9]"], "optim.betas = [0.9]", "expected a list of 2"),
    "not a choice": (
        ["trainer.precision=bf16"],
        "trainer.precision = 'bf16'",
        "one of 32, bf16-mixed, bf16-true",
    ),
    "near a choice": (["model.block=gate"], "model.block = 'gate'", "did you mean 'gated'?"),
    "too small": (["model.n_layers=0"], "model.n_layers = 0", "expected at least 1"),
    "too large": (["model.dropout=1.0"], "model.dropout = 1.0", "expected at least 0 and below 1"),
    "betas out of range": (["optim.betas=[0.9,1.5]"], "optim.betas = (0.9, 1.5)", "below 1"),
    "unknown mixer": (["model.mixer=sesa"], "model.mixer = 'sesa': no such mixer", "did you mean 'sessa'?"),
    "unknown mixer in a list": (
        ["model.mixer=[sessa,mamba9]"],
        "model.mixer[1] = 'mamba9'",
        "attention, identity",
    ),
    "no mixer at all": (["model.mixer=[]"], "model.mixer = []", "at least one mixer"),
    "unknown option of a mixer": (
        ["model.mixer.n_hed=2"],
        "model.mixer.n_hed = 2",
        "did you mean 'n_heads'?",
    ),
    "gain bound of 1": (
        ["model.mixer.gamma_max=1.0"],
        "model.mixer.gamma_max = 1.0",
        "expected above 0 and below 1",
    ),
    "heads do not divide": (
        ["model.mixer.n_heads=7"],
        "model.mixer.n_heads = 7",
        "it must divide model.d_model = 256; nearest: 8",
    ),
    "kv heads do not divide": (
        ["model.mixer={name: attention, n_heads: 8, n_kv_heads: 3}"],
        "model.mixer.n_kv_heads = 3",
        "valid: 1, 2, 4, 8",
    ),
    "odd heads cannot rotate": (["model.d_model=3"], "model.mixer.n_heads = null", "even width"),
    "option of a mixer inside another": (
        ["model.mixer={name: parallel, mixers: [mamba, {name: attention, n_heads: 7}]}"],
        "model.mixer.mixers[1].n_heads = 7",
        "it must divide model.d_model = 256; nearest: 8",
    ),
    "unknown mixer inside another": (
        ["model.mixer={name: selective_attention, below: mamab}"],
        "model.mixer.below = 'mamab': no such mixer",
        "did you mean 'mamba'?",
    ),
    "unknown option three mixers deep": (
        [
            "model.mixer=[sessa, {name: parallel, mixers: "
            "[{name: selective_attention, below: {name: mamba, d_stat: 3}}, mamba]}]"
        ],
        "model.mixer[1].mixers[0].below.d_stat = 3",
        "did you mean 'd_state'?",
    ),
    "mixer without a name inside another": (
        ["model.mixer={name: parallel, mixers: [{n_heads: 2}, mamba]}"],
        "model.mixer.mixers[0].name is missing",
        "valid: attention",
    ),
    "one mixer in parallel": (
        ["model.mixer={name: parallel, mixers: [mamba]}"],
        "model.mixer.mixers = ['mamba']",
        "exactly two mixers",
    ),
    "number for a mixer inside another": (
        ["model.mixer={name: selective_attention, below: 3}"],
        "model.mixer.below = 3",
        "a mixer's name or a mapping",
    ),
    "list for one mixer": (
        ["model.mixer={name: selective_attention, below: [mamba]}"],
        "model.mixer.below = ['mamba']",
        "one mixer, not a list",
    ),
    "unknown data module": (["data=txt"], "data = 'txt': no such data module", "did you mean 'text'?"),
    "unknown option of the data": (["data.sequence_length=8"], "data.sequence_length = 8", "seq_len"),
    "no horizon": (["trainer.steps=null"], "trainer.steps = null", "exactly one of"),
    "two horizons in overrides": (
        ["trainer.steps=3", "trainer.epochs=2"],
        "trainer.steps = 3 and trainer.epochs = 2",
        "expected exactly one of them",
    ),
    "an unknown strategy": (["strategy=ddb"], "strategy.name = 'ddb'", "did you mean 'ddp'?"),
    "no devices": (["strategy.devices=0"], "strategy.devices = 0", "at least 1"),
    "a limit that is no time": (["trainer.max_time=12"], "trainer.max_time = 12", "or null"),
    "a limit of nothing": (["trainer.max_time=h"], "trainer.max_time = 'h'", "such as 11h30m"),
    "replicas without shards": (["strategy.replicate=2"], "strategy.replicate = 2", "strategy.name = fsdp"),
    "offloading from the CPU": (
        ["strategy={name: fsdp, accelerator: cpu, cpu_offload: true}"],
        "strategy.cpu_offload = true",
        "nothing to offload",
    ),
    "bf16 shards": (
        ["strategy=fsdp", "trainer.precision=bf16-true"],
        "trainer.precision = 'bf16-true'",
        "bf16-mixed",
    ),
    "two horizons": (["trainer={steps: 3, epochs: 2}"], "trainer.epochs = 2", "exactly one of"),
    "missing data file": (["data.files=[corpsu.txt]"], "data.files", "did you mean corpus.txt?"),
    "empty data file": (["data.files=[empty.txt]"], "data.", "no document with text"),
    "too little data": (
        ["data.files=[short.txt]", "data.tokenizer=bytes"],
        "data.seq_len = ",
        "fewer than the",
    ),
    "not UTF-8": (["data.files=[latin1.txt]"], "latin1.txt", "offset 1"),
    "line that is not JSON": (
        ["data={name: text, source: files, files: [broken.jsonl], column: text}"],
        "broken.jsonl",
        "2",
    ),
    "no such column": (
        ["data={name: text, source: files, files: [broken.jsonl], column: story}"],
        "story",
        "text",
    ),
    "column not given": (["data.files=[broken.jsonl]"], "data.column = null", "column"),
    "parquet that is none": (
        ["data={name: text, source: files, files: [broken.parquet], column: text}"],
        "broken.parquet",
        "parquet",
    ),
    "file of another kind": (["data.files=[image.png]"], "image.png", ".txt"),
    "glob without a match": (["data.files=['*.rst']"], "*.rst", "matches no file"),
    "missing tokenizer": (
        ["data.tokenizer=file", "data.tokenizer_file=tokeniser.json"],
        "data.tokenizer_file = 'tokeniser.json'",
        "did you mean tokenizer.json?",
    ),
    "tokenizer that is none": (
        ["data.tokenizer=file", "data.tokenizer_file=tokenizer.json"],
        "data.tokenizer_file = 'tokenizer.json'",
        "not a tokenizer.json",
    ),
    "vocabulary of no merges": (["data.vocab_size=200"], "data.vocab_size = 200", "257"),
    "not key=value": (["model.mixer"], "'model.mixer'", "expected key=value"),
    "index into a list": (["model.mixer[0]=sessa"], "model.mixer[0]=sessa", "expected key=value"),
    "broken value": (["model.mixer={name: sessa"], "model.mixer={name: sessa", "not valid YAML"),
    "missing plug-in": (["plugins=[no_such_module]"], "plugins", "'no_such_module'; it must be installed"),
    "missing interpolation": (["optim.lr=${optim.nothing}"], "optim.nothing", "good.yaml"),
    "tokens without end": (["trainer.tokens=.inf"], "trainer.tokens = inf", "below 1e+18"),
    "seed too large": (["seed=4294967296"], "seed = 4294967296", "at most 2147483647"),
    "zero for a section": (["optim=0"], "optim = 0", "expected a mapping"),
    "accelerator that is none": (
        ["strategy.accelerator=mps"],
        "strategy.accelerator = 'mps'",
        "auto, cpu, gpu",
    ),
    "name with a path": (["name=../elsewhere"], "name = '../elsewhere'", "without slashes"),
    "folder for runs that cannot be made": (
        ["logging.dir=corpus.txt/runs", "data.seq_len=8"],
        "logging.dir = 'corpus.txt/runs'",
        "cannot be made",
    ),
    "run to resume is missing": (["resume=nowhere"], "run folder nowhere", "no such folder"),
    "no GPU": (["strategy.accelerator=tpu"], "strategy.accelerator = 'tpu'", "one of auto, cpu, gpu"),
}


@pytest.mark.parametrize(("overrides", "where", "hint"), BAD.values(), ids=BAD)
def test_a_wrong_override_gets_one_clear_line(folder, capsys, overrides, where, hint):
    assert train.main(["good.yaml", *overrides]) == 2
    *progress, error = capsys.readouterr().err.splitlines()  # what is read shows a bar before it fails
    assert error.startswith("error: ")
    assert not any("error" in line.lower() or "Traceback" in line for line in progress)
    assert where in error
    assert hint in error
    assert not (folder / "runs").exists(), "nothing was begun"


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
        "model: {mixer: [{n_heads: 2}]}\n" + GOOD,
        "model.mixer[0].name is missing",
        "valid: attention",
    ),
    "section is a list": ("optim: [1, 2]\n" + GOOD, "optim = [1, 2]", "expected a mapping"),
    "mixer is a number": ("model: {mixer: 3}\n" + GOOD, "model.mixer = 3", "a mixer's name or a mapping"),
}


@pytest.mark.parametrize(("text", "where", "hint"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_wrong_recipe_file_gets_one_clear_line(folder, capsys, text, where, hint):
    (folder / "bad.yaml").write_text(text)
    assert train.main(["bad.yaml"]) == 2
    _, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert where in err
    assert hint in err


def test_a_missing_recipe_names_the_nearest(folder, capsys):
    assert train.main(["god.yaml"]) == 2
    assert "did you mean good.yaml?" in capsys.readouterr().err


def test_layers_are_merged_in_order(folder):
    (folder / "base.yaml").write_text(GOOD + "seed: 5\noptim: {lr: 0.5, weight_decay: 0.25}\n")
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
    (folder / "r.yaml").write_text(GOOD + f"model: {{mixer: {recipe}}}\n")
    mixer = load_recipe("r.yaml", overrides).model.mixer
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
    assert to_dict(load_recipe(folder / "b.yaml")) == to_dict(recipe)


def test_print_config_prints_every_key(folder, capsys):
    assert train.main(["good.yaml", "--print-config", "model.mixer=identity"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed == to_dict(load_recipe("good.yaml", ["model.mixer=identity"]))


def test_plugins_register_before_the_recipe_is_checked(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (folder / "my_plugin.py").write_text(
        textwrap.dedent("""
        from dataclasses import dataclass, field
        from mixerlab.mixers import register_mixer
        from mixerlab.mixers.identity import Identity

        @dataclass
        class Config:
            width: int = field(default=3, metadata={"help": "width"})

        @register_mixer("mine", Config)
        class Mine(Identity):
            pass
        """)
    )
    recipe = load_recipe("good.yaml", ["plugins=[my_plugin]", "model.mixer=mine"])
    assert recipe.model.mixer == {"name": "mine", "width": 3}


def test_a_mixer_that_cannot_keep_documents_apart_is_named_however_deep(folder, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @registry.register_mixer("together", IdentityConfig)
    class Together(Identity):
        supports_segments = False

    deep = "{name: parallel, mixers: [mamba, {name: selective_attention, below: together}]}"
    for mixer in ("together", deep, f"[sessa, {deep}]"):
        assert train.main(["good.yaml", f"model.mixer={mixer}"]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            "error: data.pack = true: mixer 'together' cannot keep packed documents apart"
        )
        load_recipe("good.yaml", [f"model.mixer={mixer}", "data.pack=false"])


def test_a_plugin_that_exits_is_named(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    (folder / "leaving_plugin.py").write_text("import sys; sys.exit(3)")
    with pytest.raises(ConfigError, match="'leaving_plugin' failed: SystemExit: 3"):
        load_recipe("good.yaml", ["plugins=[leaving_plugin]"])


def test_a_plugin_cannot_replace_a_mixer(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
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
        ("a: int = 3", "has no help for a; expected field("),
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
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
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


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path):
    assert load_recipe(path).name == path.stem
