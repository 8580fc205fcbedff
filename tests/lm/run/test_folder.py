"""Run folders: their names, what is in them, and what is said where something is missing."""

import contextlib
import errno
import json
from datetime import datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import torch

from mixerlab import sealed
from mixerlab.data.tokenizers import ByteTokenizer
from mixerlab.lm.recipe.load import load_recipe, to_yaml
from mixerlab.lm.run import environment as environment_module
from mixerlab.lm.run import folder as folder_module
from mixerlab.lm.run.checkpoint import CheckpointError, read_meta, save
from mixerlab.lm.run.folder import Run, new_path, runs_of
from mixerlab.lm.run.weights import check_model
from mixerlab.options import ConfigError, plain
from mixerlab.sealed import write_meta


@pytest.fixture
def clock(monkeypatch):
    """A time that advances by a second whenever it is asked for."""

    class Clock:
        time = datetime(2026, 3, 4, 15, 16, 2)

        @classmethod
        def now(cls):
            cls.time += timedelta(seconds=1)
            return cls.time

    for module in (folder_module, environment_module):
        monkeypatch.setattr(module, "datetime", Clock)
    return Clock


def test_a_new_run_holds_its_recipe_and_where_it_runs(recipe):
    wanted = recipe("seed=3", "resume=auto")
    run = Run.create(wanted)
    assert run.checkpoints.all() == []
    assert run.checkpoints.folder.is_dir()
    assert run.has_recipe
    assert run.recipe.seed == 3
    assert run.recipe.resume is None
    assert load_recipe(run.path / "recipe.yaml").model == wanted.model
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert {"started", "python", "mixerlab", "lightning", "device", "git_commit", "command"} <= set(
        environment
    )


def test_the_name_is_the_time_and_the_label_with_a_number_where_that_is_taken(recipe, clock, tmp_path):
    plain_run, attention = recipe(), recipe("model.mixer=attention", "seed=1")
    names = [Run.create(made).path for made in (plain_run, attention, attention, attention, plain_run)]
    assert [path.name for path in names] == [
        "20260304-1516",
        "20260304-1516-mixer=attention-seed=1",
        "20260304-1516-mixer=attention-seed=1-2",
        "20260304-1516-mixer=attention-seed=1-3",
        "20260304-1516-2",
    ]
    assert {path.parent for path in names} == {tmp_path / "runs" / "tiny"}
    assert new_path(attention).name == "20260304-1516-mixer=attention-seed=1-4"
    assert not new_path(attention).exists(), "asking makes nothing"


def test_runs_are_sorted_by_when_they_began_whatever_their_names(recipe, clock):
    made = [Run.create(recipe()).path for _ in range(11)]
    assert sorted(made) != made
    assert [run.path for run in runs_of(made[0].parent)] == made[::-1]


def test_a_run_of_an_older_version_began_when_its_name_says(recipe, tmp_path):
    folder = tmp_path / "runs" / "tiny"
    for name in ("20250101-120000", "20990101-120000"):
        (folder / name).mkdir(parents=True)
    new = Run.create(recipe())
    assert Run(folder / "20250101-120000").order == (0, "20250101120000")
    assert [run.path.name for run in runs_of(folder)] == [new.path.name, "20990101-120000", "20250101-120000"]


def test_the_order_of_runs_survives_a_clock_that_goes_back(recipe, clock):
    made = []
    for _ in range(3):
        made.append(Run.create(recipe()).path)
        clock.time -= timedelta(days=100)
    assert [run.path for run in runs_of(made[0].parent)] == made[::-1]
    assert [Run(path).order[0] for path in made] == [1, 2, 3]


def test_a_run_whose_order_is_damaged_is_looked_at_first_and_named(recipe):
    first, _ = Run.create(recipe()), Run.create(recipe())
    path = first.path / "environment.json"
    path.write_text(path.read_text().replace('"number": 1', '"number": 0'))
    assert runs_of(first.path.parent)[0].path == first.path
    with pytest.raises(ConfigError, match=r"environment\.json is not what was written there"):
        _ = first.order


def test_there_are_no_runs_where_there_is_no_folder(tmp_path):
    assert list(runs_of(tmp_path / "nowhere")) == []


def test_a_folder_that_cannot_be_made_is_named(recipe, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"logging\.dir = '.*file/runs': .* cannot be made: Not a directory"
    ):
        Run.create(recipe(f"logging.dir={tmp_path / 'file' / 'runs'}"))


def test_opening_what_is_no_run_says_what_is_missing(make_run, recipe, tmp_path):
    run = make_run()
    assert Run.open(run.path).path == run.path
    (tmp_path / "file").touch()
    begun = Run.create(recipe("seed=1"))
    (bare := Run(tmp_path / "bare")).checkpoints.folder.mkdir(parents=True)
    for path, said in {
        tmp_path / "nowhere": "nowhere: no such folder; expected runs/<recipe name>/<run>",
        tmp_path / "file": "file: that is a file",
        begun.path: r"it has no checkpoints/step-\*, so there is nothing to load",
        bare.path: "it has no recipe.yaml",
        run.path.parent: "it holds several runs; did you mean .*/runs/tiny/2",
    }.items():
        with pytest.raises(ConfigError, match=said):
            Run.open(path)


def test_the_metrics_are_a_table_of_steps(recipe):
    run = Run.create(recipe())
    lines = [
        "1,train/loss,5.5",
        "1,speed/x,1.0",
        "10,train/loss,nan",
        "10,valid/loss,5.0",
        "10,valid/loss,4.0",
    ]
    (run.path / "metrics.csv").write_text("\n".join(["step,metric,value", *lines]) + "\n")
    table = run.metrics()
    assert list(table.index) == [1, 10]
    assert set(table.columns) == {"train/loss", "speed/x", "valid/loss"}
    assert table.loc[1, "train/loss"] == 5.5
    assert pd.isna(table.loc[1, "valid/loss"])
    assert table.loc[10, "valid/loss"] == 4.0, "the last that was written"


def test_a_result_marks_a_run_as_finished_until_it_is_reopened(recipe):
    run = Run.create(recipe())
    assert not run.is_finished
    assert run.result == {}
    run.finish(20, {"valid/loss": 2.5})
    assert run.is_finished
    assert Run(run.path).result == {"steps": 20, "valid/loss": 2.5}
    run.reopen()
    assert not run.is_finished
    run.reopen()  # is no error


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"steps": "x"}', '{"a": [1]}', "\x00", "[" * 100_000]
)
def test_a_damaged_result_is_none_and_is_named(recipe, text):
    run = Run.create(recipe())
    (run.path / "result.json").write_text(text)
    assert not run.is_finished
    with pytest.raises(ConfigError, match=r"^[^\n]*result\.json[^\n]*$"):
        _ = run.result
    run.finish(20, {"valid/loss": 2.5})
    assert run.result == {"steps": 20, "valid/loss": 2.5}


@pytest.mark.parametrize(
    "line",
    ["12,tr", '10,"train/loss,1.0', "x,train/loss,1.0", "10,train/loss,abc", "\x00\xff", "1,2,3,4", ""],
)
def test_damaged_lines_of_the_metrics_are_skipped(recipe, line):
    run = Run.create(recipe())
    whole = "9,train/loss,2.0\n"
    (run.path / "metrics.csv").write_text(f"step,metric,value\n{line}\n{whole}")
    assert run.metrics()["train/loss"].to_dict() == {9: 2.0}


@pytest.mark.parametrize("prompt", ["[" * 501, "x" * 10**6])
def test_a_recipe_that_could_not_be_read_again_starts_no_run(recipe, tmp_path, prompt):
    made = recipe()
    made.logging.sample_prompt = prompt
    with pytest.raises(ConfigError, match="could not be read again: it has over"):
        Run.create(made)
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "data.fingerprint", "result.json"])
def test_a_full_disk_leaves_the_file_as_it_was_and_is_said_in_one_line(recipe, monkeypatch, name):
    run = Run.create(recipe())
    run.save_data_fingerprint("abc")
    run.finish(5, {"valid/loss": 1.0})
    writes = {
        "recipe.yaml": lambda: run.save_recipe(recipe("seed=5")),
        "environment.json": run.save_environment,
        "data.fingerprint": lambda: run.save_data_fingerprint("other"),
        "result.json": lambda: run.finish(9, {"valid/loss": 0.5}),
    }

    def full(self, text, **options):
        if self.name in (f"{name}.new", "checksums.json.new"):
            with self.open("w") as file:
                file.write(text[:3])
            raise OSError(errno.ENOSPC, "No space left on device")

    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(
            ConfigError, match=r"^\S*\.json|yaml|fingerprint cannot be written: No space left on[^\n]*$"
        ):
            writes[name]()
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before
    writes[name]()
    assert sealed.noted_damage(run.path) == []


def test_a_run_that_cannot_be_begun_leaves_no_folder(recipe, monkeypatch):
    def full(self, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left on device"):
        Run.create(recipe())
    assert not list(new_path(recipe()).parent.iterdir())


@pytest.mark.parametrize("stage", range(4))
def test_a_kill_while_a_file_is_replaced_leaves_a_run_that_can_be_read(recipe, monkeypatch, stage):
    run = Run.create(recipe())
    replace, done = Path.replace, list[Path]()

    def kill(self, target):
        if len(done) == stage:
            raise KeyboardInterrupt
        done.append(target)
        return replace(self, target)

    for seed in (1, 2):  # the second time on what the first left
        done.clear()
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", kill)
            with contextlib.suppress(KeyboardInterrupt):
                run.save_recipe(recipe(f"seed={seed}"))
        assert Run(run.path).recipe.seed in (seed - 1, seed, 0)
    run.save_recipe(recipe("seed=7"))
    assert Run(run.path).recipe.seed == 7


def test_what_was_changed_by_hand_is_refused_until_it_is_accepted(make_run):
    run = make_run()
    path = run.path / "recipe.yaml"
    path.write_text(path.read_text().replace("seed: 0", "seed: 4"))
    with pytest.raises(
        ConfigError, match=r"recipe\.yaml is not what was written there: .* delete checksums\.json"
    ):
        Run.open(run.path)
    (run.path / "checksums.json").unlink()
    assert Run.open(run.path).recipe.seed == 4


def test_a_run_of_an_older_version_has_no_checksums_and_is_read(make_run):
    run = make_run()
    (run.path / "checksums.json").unlink()
    assert Run.open(run.path).decoder() is not None
    assert run.order[0] == 1
    assert isinstance(run.tokenizer(), ByteTokenizer)


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "no[x]where"])
def test_any_name_of_a_folder_that_is_not_there_is_answered(name):
    with pytest.raises(ConfigError, match=r"^run folder"):
        Run.open(name)


def test_only_one_holds_the_lock(recipe):
    run, again = Run.create(recipe()), None
    with run.lock():
        again = Run(run.path)
        with pytest.raises(ConfigError, match=r"run folder .*: another process is training that run"):
            again.lock()
    again.lock().release()


def test_a_run_that_is_held_is_locked_until_it_is_released(recipe):
    run = Run.create(recipe())
    run.hold()
    with pytest.raises(ConfigError, match="another process is training that run"):
        Run(run.path).lock()
    Run(run.path).release()  # by whichever object of this process
    run.lock().release()
    run.release()  # is no error


def test_a_run_that_cannot_be_locked_is_named(recipe, monkeypatch):
    def closed(self, timeout=None):
        raise PermissionError(errno.EACCES, "Permission denied")

    run = Run.create(recipe())
    monkeypatch.setattr(folder_module.FileLock, "acquire", closed)
    with pytest.raises(ConfigError, match=r"run folder .*: it cannot be locked: Permission denied"):
        run.lock()


def test_differences_leave_out_names_and_places(recipe, tmp_path):
    run = Run.create(recipe())
    assert run.differences(recipe()) == []
    assert run.differences(recipe("name=b", "label=c", "resume=auto", f"logging.dir={tmp_path}")) == []
    assert run.differences(recipe("optim.lr=1", "logging.every=3")) == [
        ("optim.lr", 0.01, 1.0),
        ("logging.every", 1, 3),
    ]


def test_the_recipe_is_read_anew_once_it_is_written(recipe):
    run = Run.create(recipe())
    assert run.recipe.seed == 0
    run.save_recipe(recipe("seed=4"))
    assert run.recipe.seed == 4


def test_the_datas_fingerprint_is_noted(recipe):
    run = Run.create(recipe())
    assert run.data_fingerprint is None
    run.save_data_fingerprint("abc")
    assert run.data_fingerprint == "abc"
    run.save_data_fingerprint("")
    assert run.data_fingerprint == ""


def test_the_decoder_is_that_of_the_checkpoint_asked_for(make_run):
    run = make_run(step=5, valid_loss=2.0)
    state = {"a": torch.load(run.checkpoints.at(5) / "state.ckpt", weights_only=True)}["a"]
    state["state_dict"]["decoder.embedding.weight"] += 1
    save({**state, "global_step": 7, "valid_loss": 3.0}, run.checkpoints.at(7))
    last, best = run.decoder(), run.decoder("best")
    assert not last.training
    assert torch.equal(last.embedding.weight, best.embedding.weight + 1)
    assert torch.equal(run.decoder("7").embedding.weight, last.embedding.weight)
    with pytest.raises(CheckpointError, match="no such checkpoint; that run has checkpoints of steps 5, 7"):
        run.decoder("6")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused(make_run):
    with pytest.raises(ConfigError, match="device = 'cuda': no CUDA device is available here; expected cpu"):
        make_run().decoder(device="cuda")


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(make_run, recipe):
    run = make_run()
    checkpoint = run.checkpoints.last()
    check_model(checkpoint, recipe("optim.lr=1"))
    with pytest.raises(ConfigError, match=r"is of another recipe: model\.d_model is 32 there and 48 in the"):
        check_model(checkpoint, recipe("model.d_model=48"))
    run.save_recipe(recipe("model.d_model=48"))
    with pytest.raises(ConfigError, match=r"is of another recipe: model\.d_model"):
        run.decoder()


def test_weights_that_do_not_fit_are_named_in_one_line(make_run):
    run = make_run()
    state = torch.load(run.checkpoints.last() / "state.ckpt", weights_only=True)
    del state["state_dict"]["decoder.norm.weight"]
    save(state, run.checkpoints.at(5))
    with pytest.raises(
        ConfigError, match=r"^[^\n]* does not fit the recipe's decoder: [^\n]*norm\.weight[^\n]*$"
    ):
        run.decoder()


def test_bf16_weights_are_loaded_as_they_are(make_run):
    run = make_run("trainer.precision=bf16-true")
    assert run.decoder().embedding.weight.dtype == torch.bfloat16


def test_a_run_without_a_tokenizer_says_so(recipe):
    with pytest.raises(ConfigError, match="it has no tokenizer, so its tokens are not text"):
        Run.create(recipe()).tokenizer()


def test_text_is_generated_from_the_last_checkpoint(make_run):
    run = make_run()
    text = run.generate("The ", 5, seed=1)
    assert text.startswith("The ")
    assert text == run.generate("The ", 5, seed=1)
    assert len(text) > len("The ")


def test_the_saved_recipe_is_all_that_the_run_was(recipe):
    wanted = recipe("model.mixer=[attention, mamba]", "label=mine")
    run = Run.create(wanted)
    assert (run.path / "recipe.yaml").read_text() == to_yaml(wanted)
    assert plain(run.recipe) == plain(wanted)


def test_a_checkpoint_from_before_an_option_existed_is_read(make_run):
    run = make_run()
    folder = run.checkpoints.last()
    meta = read_meta(folder)
    del meta["recipe"]["model"]["dropout"], meta["recipe"]["model"]["mixer"]["gamma_max"]
    write_meta(folder, meta)
    assert run.decoder()(torch.tensor([[1, 2]])).shape == (1, 2, 257)


def test_a_run_needs_no_git(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = Run.create(recipe())
    assert json.loads((run.path / "environment.json").read_text())["git_commit"] is None


@pytest.mark.parametrize(
    "text", ["1e-3", "1e5", "true", "null", "~", "0x10", "${HOME}", "a: b", "[x]", "2026-11-26"]
)
def test_text_that_looks_like_something_else_is_read_as_it_was_written(recipe, text):
    made = recipe()
    made.logging.sample_prompt = made.label = text
    run = Run.create(made)
    assert run.recipe.logging.sample_prompt == text
    assert run.recipe.label == text
