"""Recipes that are wrong: one line each, that names the key, its value and what would be right."""

from dataclasses import dataclass
from typing import Literal

import pytest

from mixerlab.lm.recipe.check import (
    check_recipe,
    for_any_devices,
    for_devices,
    mixers_of,
    with_auto_backends,
)
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.mixers import MIXERS, register_mixer
from mixerlab.mixers.identity import Identity, IdentityConfig
from mixerlab.options import Choice, ConfigError, option, plain
from tiny_runs import train

BAD = {
    "typo in a section": (["optm.lr=1"], "optm = {'lr': 1}: no such key", "did you mean 'optim'?"),
    "typo in a key": (["optim.learning_rate=1"], "optim.learning_rate = 1: no such key", "lr"),
    "former name of a key": (["model.mlp_width=9"], "model.mlp_width = 9", "it is called mlp_dim now"),
    "former name of a mixer's key": (
        ["model.mixer={name: mamba2, head_width: 8}"],
        "model.mixer.head_width = 8: no such key",
        "it is called head_dim now",
    ),
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
        "attention, deltaformer, ",
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
    "memory plots of shards": (
        ["strategy=fsdp", "logging.memory_every=1"],
        "logging.memory_every = 1",
        "expected 0",
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
    "name of the folder above": (["name=.."], "name = '..'", "the name of a folder"),
    "no name": (["name=''"], "name = ''", "the name of a folder"),
    "name with a NUL": (['name="a\\0b"'], "name = 'a\\x00b'", "without the character NUL"),
    "name of two lines": (['name="a\\nb"'], "name = 'a\\nb'", "the name of a folder"),
    "folder with a NUL": (['logging.dir="a\\0b"'], "logging.dir = 'a\\x00b'", "without the character NUL"),
    "data with a NUL": (['data.files=["a\\0b"]'], "data.files = ['a\\x00b']", "without the character NUL"),
    "a rate that overflows": (["optim.lr=3e38"], "optim.lr = 3e+38", "expected above 0 and below 1000000"),
    "an infinite rate": (["optim.lr=.inf"], "optim.lr = inf", "expected above 0 and below 1000000"),
    "an infinite timeout": (["strategy.timeout=.inf"], "strategy.timeout = inf", "below 1000000000"),
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
    assert train("good.yaml", *overrides) == 2
    *progress, error = capsys.readouterr().err.splitlines()  # what is read shows a bar before it fails
    assert error.startswith("error: ")
    assert not any("error" in line.lower() or "Traceback" in line for line in progress)
    assert where in error
    assert hint in error
    assert not (folder / "runs").exists(), "nothing was begun"


def test_a_mixer_that_cannot_keep_documents_apart_is_named_however_deep(folder, monkeypatch, capsys):
    monkeypatch.setattr(MIXERS, "_entries", dict(MIXERS._entries))

    @register_mixer("together", IdentityConfig)
    class Together(Identity):
        supports_segments = False

    deep = "{name: parallel, mixers: [mamba, {name: selective_attention, below: together}]}"
    for mixer in ("together", deep, f"[sessa, {deep}]"):
        assert train("good.yaml", f"model.mixer={mixer}") == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(
            "error: data.pack = true: mixer 'together' cannot keep packed documents apart"
        )
        load_recipe("good.yaml", [f"model.mixer={mixer}", "data.pack=false"])


def test_a_checked_recipe_holds_choices_down_to_the_innermost_mixer():
    raw = {"data": "text", "trainer": {"steps": 1}}
    one = check_recipe({**raw, "model": {"mixer": "attention"}}, check_data=False)
    assert isinstance(one.data, Choice)
    assert isinstance(one.model.mixer, Choice)
    assert [mixer.name for mixer in mixers_of(one)] == ["attention"]
    inner = {"name": "selective_attention", "below": "mamba"}
    both = check_recipe({**raw, "model": {"mixer": ["sessa", inner]}}, check_data=False)
    assert [mixer.name for mixer in mixers_of(both)] == ["sessa", "selective_attention"]
    below = mixers_of(both)[1].options.below
    assert isinstance(below, Choice)
    assert below.name == "mamba"


def test_a_checked_recipe_is_checked_to_the_same():
    recipe = check_recipe({"data": "text", "trainer": {"steps": 1}}, check_data=False)
    assert check_recipe(plain(recipe), check_data=False) == recipe


def test_heads_are_held_against_the_width_once_that_is_known():
    mixer = {"name": "attention", "n_heads": 7}
    raw = {"data": "text", "trainer": {"steps": 1}}
    check_recipe({**raw, "model": {"mixer": mixer, "match_params": "1M"}}, check_data=False)
    with pytest.raises(ConfigError, match=r"model\.mixer\.n_heads = 7: it must divide"):
        check_recipe({**raw, "model": {"mixer": mixer}}, check_data=False)


def test_files_that_have_gone_matter_only_where_the_data_is_checked(folder):
    raw = {"data": {"name": "text", "files": ["gone.txt"], "source": "files"}, "trainer": {"steps": 1}}
    assert check_recipe(raw, check_data=False).data.options.files == ["gone.txt"]
    with pytest.raises(ConfigError, match=r"data\.files"):
        check_recipe(raw)


@pytest.mark.parametrize(
    ("changes", "devices", "accumulate"),
    [
        (["trainer.rows_per_step=64"], 1, 4),
        (["trainer.rows_per_step=64"], 4, 1),
        (["trainer.rows_per_step=64", "trainer.batch_size=1"], 2, 32),
        (["trainer.accumulate=3"], 2, 3),
    ],
)
def test_the_micro_batches_follow_from_the_rows_a_step(folder, changes, devices, accumulate):
    recipe = for_devices(load_recipe("good.yaml", changes), devices)
    assert recipe.trainer.accumulate == accumulate
    assert for_devices(recipe, devices) == recipe
    assert (
        recipe.trainer.step_rows(devices) == recipe.trainer.rows_per_step
        or recipe.trainer.rows_per_step is None
    )
    assert for_any_devices(recipe) == load_recipe("good.yaml", changes)


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        (
            {"rows_per_step": 60},
            1,
            r"rows_per_step = 60: expected a multiple of trainer\.batch_size, which is 16",
        ),
        (
            {"rows_per_step": 48},
            2,
            r"batch_size = 16 x 2 devices .*; expected .* that divides 24, or 32 or 64 rows",
        ),
        ({"rows_per_step": 16}, 3, r"expected a number of devices that divides 1, or 48 rows"),
    ],
)
def test_rows_a_step_that_contradict_their_parts_are_refused(folder, changes, devices, said):
    with pytest.raises(ConfigError, match=said):
        for_devices(load_recipe("good.yaml", trainer=changes), devices)


def test_the_rows_a_step_and_the_micro_batches_replace_each_other(folder):
    (folder / "rows.yaml").write_text("base: good.yaml\ntrainer: {rows_per_step: 64}\n")
    assert load_recipe("rows.yaml", ["trainer.accumulate=2"]).trainer.rows_per_step is None
    (folder / "parts.yaml").write_text("base: good.yaml\ntrainer: {accumulate: 2}\n")
    assert load_recipe("parts.yaml", ["trainer.rows_per_step=64"]).trainer.accumulate == 1
    with pytest.raises(
        ConfigError, match=r"accumulate = 2 and trainer\.rows_per_step = 64: expected exactly one"
    ):
        load_recipe("good.yaml", ["trainer.accumulate=2", "trainer.rows_per_step=64"])
    # In one file both may stand, as in the one of a run, if they agree.
    (folder / "both.yaml").write_text("base: good.yaml\ntrainer: {rows_per_step: 64, accumulate: 2}\n")
    both = load_recipe("both.yaml")
    assert for_devices(both, 2) == both
    with pytest.raises(
        ConfigError, match=r"accumulate = 2: trainer\.rows_per_step = 64 is 4 x .*; expected 4, or only"
    ):
        for_devices(both, 1)


def test_no_mixer_keeps_the_backend_it_names_at_any_depth_and_nothing_else_changes(monkeypatch):
    @dataclass
    class Config:
        backend: Literal["fast", "slow"] = option("slow", "of its own, without auto")

    monkeypatch.setitem(MIXERS._entries, "own", (Config, Identity))

    def recipe(backend):
        named = {} if backend is None else {"backend": backend}
        inner = {"name": "mamba", "d_state": 4, **named}
        taipan = {"name": "selective_attention", "below": inner}
        mixer = [
            {"name": "sessa", **named},
            {"name": "parallel", "mixers": ["attention", taipan]},
            {"name": "own", "backend": "fast"},
        ]
        return check_recipe({"model": {"d_model": 64, "mixer": mixer}, "trainer": {"steps": 1}})

    given = recipe("triton")
    assert with_auto_backends(given) == recipe(None)
    assert given == recipe("triton"), "it is not changed in place"
    alone = check_recipe(
        {"model": {"mixer": {"name": "mamba2", "backend": "mamba_ssm"}}, "trainer": {"steps": 1}}
    )
    assert with_auto_backends(alone).model.mixer.options.backend == "auto"
