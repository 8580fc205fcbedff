"""Run folders of strangers: no command imports, looks up or unpickles what is in them; each says why in a line."""

import importlib
import json
import pickle
import shutil
import sys

import pytest
import torch

from damage import a_run
from mixerlab import load_recipe, open_run
from mixerlab.__main__ import VERBS, main
from mixerlab.lm.recipe.files import LONGEST_SAVED
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError
from tiny_runs import TINY

EVIL = "evil_plugin_of_a_stranger"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A file that is there once anything of the stranger's was run, and a secret that must not be shown."""
    path = tmp_path / "marker"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{EVIL}.py").write_text(f"open({str(path)!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("SECRET", "the-secret")
    yield path
    sys.modules.pop(EVIL, None)


@pytest.fixture
def run(options, marker):
    """The run, before the stranger had it. It has no checksums, and no fingerprint; a stranger could make both."""
    path = a_run(options)
    for name in ("checksums.json", "data.fingerprint"):
        (path / name).unlink()
    return path


def change(path, before, after):
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after))


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def plugin(run, marker):
    change(run / "recipe.yaml", "plugins: []", f"plugins: [{EVIL}]")


def interpolation(run, marker):
    change(run / "recipe.yaml", "sample_prompt: ''", "sample_prompt: ${oc.env:SECRET}")


def escaped_twice(run, marker):
    change(run / "recipe.yaml", "sample_prompt: ''", r"sample_prompt: \\${oc.env:SECRET}")


def base(run, marker):
    (run / "other.yaml").write_text(f"plugins: [{EVIL}]\n")
    change(run / "recipe.yaml", "plugins: []", "base: other.yaml")


def match(run, marker):
    (run / "other.yaml").write_text(f"plugins: [{EVIL}]\n")
    change(run / "recipe.yaml", "match: null", "match: other.yaml")


def python_tag(run, marker):
    change(
        run / "recipe.yaml", "sample_prompt: ''", f"sample_prompt: !!python/object/apply:open [{marker}, w]"
    )


def aliases(run, marker):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 64))]
    change(run / "recipe.yaml", "plugins: []", "\n".join(lines))


def huge_recipe(run, marker):
    (run / "recipe.yaml").write_text("#" * (LONGEST_SAVED + 1))


def nested_recipe(run, marker):
    (run / "recipe.yaml").write_text("[" * 90_000)


def huge_model(run, marker):
    change(run / "recipe.yaml", "d_model: 32", "d_model: 1000000000")
    _without_recipe_in_the_checkpoint(run)


def deep_model(run, marker):
    change(run / "recipe.yaml", "n_layers: 2", "n_layers: 1000000000")
    _without_recipe_in_the_checkpoint(run)


def _without_recipe_in_the_checkpoint(run):
    checkpoint = Run(run).checkpoints.at(5)
    state = torch.load(checkpoint / "state.ckpt", weights_only=True)
    save({**state, "recipe": None}, checkpoint)


def tokenizer_garbage(run, marker):
    (run / "tokenizer.json").write_bytes(bytes(range(256)))


def tokenizer_pickled(run, marker):
    (run / "tokenizer.json").write_bytes(pickle.dumps(Evil(marker), 0))


def tokenizer_with_huge_ids(run, marker):
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["zz"] = 2**32 - 1
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))


def tokenizer_too_large(run, marker):
    tokenizer = json.loads((run / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {f"zz{n}": 280 + n for n in range(9)}
    (run / "tokenizer.json").write_text(json.dumps(tokenizer))


def tokenizer_of_no_kind(run, marker):
    (run / "tokenizer_config.json").write_text("[]")


def checkpoint_pickled(run, marker):
    state = Run(run).checkpoints.at(5) / "state.ckpt"
    torch.save({"global_step": 5, "state_dict": Evil(marker)}, state)
    _with_right_checksums(run)


def checkpoint_of_bare_pickle(run, marker):
    (Run(run).checkpoints.at(5) / "state.ckpt").write_bytes(pickle.dumps(Evil(marker)))
    _with_right_checksums(run)


def checkpoint_of_another_structure(run, marker):
    save({"global_step": 5, "state_dict": [1, {"a": 2}]}, Run(run).checkpoints.at(5))


def _with_right_checksums(run):
    from mixerlab import sealed

    folder = Run(run).checkpoints.at(5)
    meta = sealed.read_meta(folder)
    meta["files"] = {name: sealed.size_and_checksum(folder / name) for name in meta["files"]}
    sealed.write_meta(folder, meta)


RECIPES = (
    *(plugin, interpolation, escaped_twice, base, match, python_tag),
    *(aliases, huge_recipe, nested_recipe),
)
MODELS = (huge_model, deep_model)
TOKENIZERS = (
    *(tokenizer_garbage, tokenizer_pickled, tokenizer_with_huge_ids, tokenizer_too_large),
    tokenizer_of_no_kind,
)
CHECKPOINTS = (checkpoint_pickled, checkpoint_of_bare_pickle, checkpoint_of_another_structure)

COMMANDS = {
    "generate": lambda run, options: ["generate", run],
    "validate": lambda run, options: ["validate", run],
    "checkpoints": lambda run, options: ["checkpoints", run],
    "checkpoints --to": lambda run, options: ["checkpoints", run, "--to", "sharded"],
    "describe": lambda run, options: ["describe", run / "recipe.yaml"],
    "train": lambda run, options: ["train", run / "recipe.yaml", *options],
    "train --print-config": lambda run, options: ["train", run / "recipe.yaml", "--print-config"],
    "train --dry-run": lambda run, options: ["train", run / "recipe.yaml", "--dry-run"],
    "train resume": lambda run, options: ["train", TINY, *options, f"resume={run}"],
    "train resume=auto": lambda run, options: ["train", TINY, *options, "resume=auto"],
    "train model.match": lambda run, options: ["train", TINY, *options, f"model.match={run / 'recipe.yaml'}"],
    "memory": lambda run, options: ["memory", run],
    "attribute": lambda run, options: ["attribute", run, "--text", "some text"],
    "attribute --faithfulness": lambda run, options: ["attribute", run, "--faithfulness", "8"],
    "memory of a recipe": lambda run, options: ["memory", run / "recipe.yaml"],
    "sweep": lambda run, options: ["sweep", run / "recipe.yaml", "seed=0,1", *options],
    "report": lambda run, options: ["report", run],
    "evaluate": lambda run, options: ["evaluate", run, "--tasks", "prose", "--include-path", run],
    "convert": lambda run, options: ["convert", run, "--to", run.parent / "converted"],
    "export": lambda run, options: ["export", run, "--to", run.parent / "exported"],
}
"""Every command that is given a run folder, or finds one; `keys` takes none."""

READ_WEIGHTS = ("generate", "validate", "memory", "export", "attribute", "evaluate")


def refused(run, options, marker, capsys, command):
    """Whether a command refuses the run in one line, in which case it has run nothing and tells no secret."""
    code = main(list(map(str, COMMANDS[command](run, options))))
    out, err = capsys.readouterr()
    assert not marker.exists(), "it ran what a stranger wrote"
    assert EVIL not in sys.modules
    assert "the-secret" not in out + err
    assert "Traceback" not in err
    if code:
        assert code == 2
        lines = [line for line in err.splitlines() if not line.startswith("tokenising")]
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
    return code == 2


def test_all_commands_are_tried():
    assert {name.partition(" ")[0] for name in COMMANDS} == set(VERBS) - {"keys"}


@pytest.mark.parametrize("hostile", RECIPES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_hostile_recipe_is_refused_by_every_command(run, options, marker, capsys, command, hostile):
    hostile(run, marker)
    if command == "train resume=auto" and hostile is plugin:
        # A recipe with other plug-ins is another recipe, as in every comparison of folders: a new run begins.
        options = [*options, "trainer.max_time=1s", "data.files=nowhere.txt"]
    assert refused(run, options, marker, capsys, command)


@pytest.mark.parametrize("hostile", MODELS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", READ_WEIGHTS)
def test_a_model_that_asks_for_all_memory_is_refused(run, options, marker, capsys, command, hostile):
    hostile(run, marker)
    assert refused(run, options, marker, capsys, command)


@pytest.mark.parametrize("hostile", TOKENIZERS, ids=lambda f: f.__name__)
def test_a_hostile_tokenizer_is_refused_where_it_is_read(run, options, marker, capsys, hostile):
    hostile(run, marker)
    assert refused(run, options, marker, capsys, "generate")
    assert not refused(run, options, marker, capsys, "checkpoints")


@pytest.mark.parametrize("hostile", CHECKPOINTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("command", [*READ_WEIGHTS, "train resume", "train resume=auto"])
def test_a_hostile_checkpoint_is_refused_where_it_is_read(run, options, marker, capsys, command, hostile):
    hostile(run, marker)
    assert refused(run, options, marker, capsys, command)


def test_with_consent_the_plugins_are_imported(run, options, marker, capsys):
    plugin(run, marker)
    assert main(["generate", str(run), "--max-new-tokens", "1", "--allow-plugins"]) == 0
    assert marker.exists()
    # Which this process need not ask again, as nothing more is run.
    assert main(["generate", str(run), "--max-new-tokens", "1"]) == 0


@pytest.mark.parametrize("arguments", [["describe"], ["train", "--print-config"]])
def test_consent_is_given_to_recipes_in_run_folders_alike(run, marker, capsys, arguments):
    plugin(run, marker)
    assert main([*arguments, str(run / "recipe.yaml"), "--allow-plugins"]) == 0
    assert marker.exists()


def test_plugins_that_the_command_line_names_are_those_that_are_imported(run, marker, capsys):
    plugin(run, marker)
    assert main(["train", "--print-config", str(run / "recipe.yaml"), "plugins=[]"]) == 0
    assert not marker.exists()


def test_from_python_consent_is_an_argument(run, marker):
    plugin(run, marker)
    with pytest.raises(ConfigError, match=rf"plugins = \['{EVIL}'\]: .*from Python allow_plugins=True"):
        open_run(run)
    with pytest.raises(ConfigError, match="allow_plugins=True"):
        load_recipe(run / "recipe.yaml")
    with pytest.raises(ConfigError, match="allow_plugins=True"):
        _ = Run(run).recipe
    assert not marker.exists()
    trusted = open_run(run, allow_plugins=True)
    assert not marker.exists(), "nothing needed it yet"
    assert trusted.recipe.plugins == [EVIL]
    assert marker.exists()


def test_a_recipe_that_builds_on_a_run_needs_consent_too(run, marker, tmp_path):
    plugin(run, marker)
    (tmp_path / "mine.yaml").write_text(f"base: {run / 'recipe.yaml'}\n")
    with pytest.raises(ConfigError, match="allow_plugins=True"):
        load_recipe(tmp_path / "mine.yaml")
    (tmp_path / "mine.yaml").write_text(f"base: {run / 'recipe.yaml'}\nplugins: []\n")
    assert load_recipe(tmp_path / "mine.yaml").plugins == []
    (tmp_path / "link.yaml").symlink_to(run / "recipe.yaml")
    with pytest.raises(ConfigError, match="allow_plugins=True"):
        load_recipe(tmp_path / "link.yaml")
    assert not marker.exists()


def test_a_recipe_that_lies_in_no_run_folder_is_trusted(run, marker, tmp_path):
    plugin(run, marker)
    shutil.copy(run / "recipe.yaml", tmp_path / "recipe.yaml")
    importlib.invalidate_caches()
    load_recipe(tmp_path / "recipe.yaml")
    assert marker.exists()
