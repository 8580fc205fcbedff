"""What a run begins from: which run goes on, and which changes it bears."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mixerlab.data.tokenizers import ByteTokenizer
from mixerlab.lm.recipe.check import for_devices
from mixerlab.lm.run import start as start_module
from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start
from mixerlab.options import ConfigError
from mixerlab.sealed import write_meta
from started_runs import DDP, assert_same_curves, finish, layout, start
from tiny_runs import TINY, interrupt, run_dirs


@pytest.fixture
def data():
    """As much of a data module as a start looks at."""
    return SimpleNamespace(fingerprint="abc", tokenizer=None, save_tokenizer=lambda folder: None)


def test_without_resume_nothing_is_continued(make_run, recipe):
    make_run()
    begin = Start.find(recipe())
    assert begin == Start()
    assert begin.step == 0
    assert begin.is_validated


def test_auto_takes_the_newest_unfinished_run_of_the_same_recipe(make_run, recipe):
    older, finished = make_run(), make_run()
    newer, other, locked = make_run(step=6), make_run("optim.lr=1"), make_run()
    Run.create(recipe())  # has no checkpoint
    finished.finish(5, {})
    with locked.lock():
        begin = Start.find(recipe("resume=auto"))
    assert begin.run.path == newer.path
    assert begin.step == 6
    assert begin.checkpoint == newer.checkpoints.at(6)
    for run in (newer, locked, finished):
        shutil.rmtree(run.path)
    assert Start.find(recipe("resume=auto")).run.path == older.path
    assert Start.find(recipe("resume=auto", "optim.lr=1")).run.path == other.path
    assert Start.find(recipe("resume=auto", "seed=9")) == Start()


def test_auto_finds_that_the_newest_run_of_the_recipe_is_finished(make_run, recipe):
    make_run()
    finished = make_run(step=20)
    make_run("seed=5")
    finished.finish(20, {"valid/loss": 2.0})
    begin = Start.find(recipe("resume=auto"))
    assert begin.run.path == finished.path
    assert begin.run.is_finished
    assert begin.checkpoint is None


def test_a_start_crosses_to_other_ranks_as_json(make_run, recipe):
    make_run()
    begin = Start.find(recipe("resume=auto"))
    again = Start.from_plain(json.loads(json.dumps(begin.plain())))
    assert (again.run.path, again.checkpoint, again.meta) == (begin.run.path, begin.checkpoint, begin.meta)
    none = Start.find(recipe("resume=auto", "seed=4"))
    assert Start.from_plain(json.loads(json.dumps(none.plain()))).passed_over == none.passed_over
    assert none.passed_over is not None


def test_where_no_run_fits_auto_says_what_the_newest_differs_in(make_run, recipe):
    make_run("seed=3")
    run = make_run("trainer.steps=50")
    begin = Start.find(recipe("resume=auto", "trainer.steps=100"))
    assert begin.run is None
    assert begin.passed_over == f"the newest unfinished run {run.path} differs in trainer.steps: 50, now 100"
    with run.lock():  # it is being trained
        assert "seed: 3, now 0" in Start.find(recipe("resume=auto", "trainer.steps=100")).passed_over


def _cut(path):
    path.write_bytes(b"")


def _garbage(path):
    path.write_bytes(b"\xff" * 9)


def _flip(path):
    content = bytearray(path.read_bytes())
    content[40] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "name"),
    [
        *((harm, name) for harm in (_cut, _garbage, _flip) for name in ("recipe.yaml", "environment.json")),
        (Path.unlink, "recipe.yaml"),  # without environment.json it is a run of an older version
    ],
)
def test_auto_stops_where_a_run_with_checkpoints_cannot_be_read(make_run, recipe, harm, name):
    make_run()
    run = make_run()
    harm(run.path / name)
    with pytest.raises(
        ConfigError, match=r"^resume = 'auto': [^\n]* has checkpoints, so no new run is started"
    ) as said:
        Start.find(recipe("resume=auto"))
    assert str(run.path / name) in str(said.value)


def test_auto_stops_where_all_checkpoints_of_a_run_are_damaged(make_run, recipe):
    run = make_run()
    _flip(run.checkpoints.at(5) / "state.ckpt")
    with pytest.raises(ConfigError, match=r"step-00000005 is damaged"):
        Start.find(recipe("resume=auto"))


def test_auto_stops_before_a_run_of_a_version_to_come_that_may_be_the_wanted(make_run, recipe):
    make_run()
    for change, stops in (("", True), ("seed=3", False)):
        broken = make_run(*filter(None, [change]))
        path = broken.path / "recipe.yaml"
        path.write_text(path.read_text() + "key_of_a_version_to_come: 3\n")
        (broken.path / "checksums.json").unlink()
        if stops:
            with pytest.raises(ConfigError, match="key_of_a_version_to_come = 3: no such key"):
                Start.find(recipe("resume=auto"))
        else:
            assert Start.find(recipe("resume=auto")).run.path != broken.path, "it clearly differs"
        shutil.rmtree(broken.path)


@pytest.mark.parametrize("closed", ["recipe", "folder", "lock"])
def test_auto_passes_by_what_another_user_has_closed(make_run, recipe, monkeypatch, closed):
    mine, foreign = make_run(), make_run()
    if closed == "recipe":
        monkeypatch.setattr(os, "access", lambda path, mode: foreign.path not in Path(path).parents)
    else:
        method = {"folder": (Path, "exists"), "lock": (start_module.Run, "lock")}[closed]
        original = getattr(*method)

        def deny(self, *arguments):
            path = Path(getattr(self, "path", self))
            if foreign.path in (path, *path.parents) and (closed == "lock" or path.name == "recipe.yaml"):
                refused = PermissionError(errno.EACCES, "Permission denied")
                if closed == "lock":
                    raise ConfigError("it cannot be locked") from refused
                raise refused
            return original(self, *arguments)

        monkeypatch.setattr(*method, deny)
    assert Start.find(recipe("resume=auto")).run.path == mine.path


def test_runs_whose_plugins_the_recipe_has_too_are_continued(make_run, recipe):
    run = make_run("plugins=[math]")
    assert Start.find(recipe("resume=auto", "plugins=[json,math]")).run.path == run.path
    assert Start.find(recipe(f"resume={run.path}", "plugins=[json,math]")).run.path == run.path
    assert Start.find(recipe("resume=auto", "plugins=[json]")).run is None


def test_looking_for_a_run_imports_nothing(make_run, recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "plugin_of_another.py").write_text("raise AssertionError('imported')")
    run = make_run()
    path = run.path / "recipe.yaml"
    path.write_text(path.read_text().replace("plugins: []", "plugins: [plugin_of_another]"))
    (run.path / "checksums.json").unlink()
    assert Start.find(recipe("resume=auto")) == Start()
    with pytest.raises(ConfigError, match="would import and run 'plugin_of_another'"):
        Start.find(recipe(f"resume={run.path}"))


@pytest.mark.parametrize(
    "notes", [{"global_step": "x"}, {"global_step": None}, {"rows_per_step": "4"}, {"metrics": 3}]
)
def test_a_checkpoint_whose_notes_are_of_another_kind_is_refused(make_run, recipe, notes):
    run = make_run()
    folder = run.checkpoints.at(5)
    write_meta(folder, {**read_meta(folder), **notes})
    with pytest.raises(ConfigError, match=f"checkpoint .*{next(iter(notes))}"):
        Start.find(recipe("resume=auto"))


@pytest.mark.parametrize(
    "change", ["trainer.batch_size=2", "strategy.timeout=5", "trainer.on_non_finite=skip", "label=other"]
)
def test_auto_lets_the_place_and_the_answer_to_bad_numbers_change(make_run, recipe, change):
    run = make_run()
    assert Start.find(recipe("resume=auto", change)).run.path == run.path


@pytest.mark.parametrize("change", ["trainer.steps=30", "logging.every=2", "trainer.val_every=3"])
def test_a_run_that_is_named_bears_more_changes_than_auto(make_run, recipe, change):
    run = make_run()
    assert Start.find(recipe("resume=auto", change)) == Start()
    assert Start.find(recipe(f"resume={run.path}", change)).run.path == run.path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optim.lr=1", r"optim\.lr was 0\.01 and is now 1\.0"),
        ("seed=2", "seed was 0 and is now 2"),
        ("model.mixer=attention", r"model\.mixer\.name was 'sessa' and is now 'attention'"),
    ],
)
def test_what_decided_what_was_learnt_cannot_change(make_run, recipe, change, said):
    run = make_run()
    with pytest.raises(ConfigError, match=f"resume = '{run.path}': that run has another recipe: {said}"):
        Start.find(recipe(f"resume={run.path}", change))


def test_a_run_that_is_not_there_cannot_be_continued(recipe):
    with pytest.raises(ConfigError, match="run folder nowhere: no such folder"):
        Start.find(recipe("resume=nowhere"))


def test_a_checkpoint_knows_whether_it_was_validated(make_run, recipe):
    for metrics, validated in ((None, False), ({"valid/loss": 2.0}, True)):
        run = make_run(metrics=metrics)
        assert Start.find(recipe(f"resume={run.path}")).is_validated == validated


def test_a_new_run_gets_a_folder(recipe, data):
    run = Start().open(recipe(), data, steps=20, devices=1)
    assert run.has_recipe
    assert run.data_fingerprint == "abc"


def test_a_continued_run_says_what_is_otherwise_than_before(make_run, recipe, data):
    run = make_run()
    said: list[str] = []
    run.finish(5, {})
    (run.checkpoints.folder / "step-00000009").mkdir()  # damaged
    wanted = recipe(f"resume={run.path}", "trainer.steps=30", "trainer.batch_size=2", "trainer.accumulate=2")
    begin = Start.find(wanted)
    assert begin.open(wanted, data, steps=30, devices=1, say=said.append) is begin.run
    assert said == [
        f"continuing {run.path} after step 5",
        "  trainer.steps: was 20, now 30",
        "  trainer.batch_size: was 4, now 2",
        "  trainer.accumulate: was 1, now 2",
    ]
    assert not run.is_finished
    assert run.checkpoints.all() == [run.checkpoints.at(5)]
    assert Run(run.path).recipe.trainer.steps == 30


def test_a_run_at_its_end_is_not_continued(make_run, recipe, data):
    run = make_run(step=20)
    run.finish(20, {})
    wanted = recipe(f"resume={run.path}")
    with pytest.raises(
        ConfigError, match=r"has done 20 steps, .* ends after 20; .* such as trainer\.steps=40"
    ):
        Start.find(wanted).open(wanted, data, steps=20, devices=1)
    assert run.is_finished


def test_a_run_that_lacks_its_last_validation_goes_on_to_it(make_run, recipe, data):
    run = make_run(step=20)
    wanted = recipe(f"resume={run.path}")
    begin = Start.find(wanted)
    assert not begin.finish(20)
    begin.open(wanted, data, steps=20, devices=1).release()


def test_an_open_run_is_locked_from_then_on_but_not_one_that_was_refused(make_run, recipe, data):
    run = make_run()
    wanted = recipe(f"resume={run.path}")
    opened = Start.find(wanted).open(wanted, data, steps=20, devices=1)
    with pytest.raises(ConfigError, match="another process is training that run"):
        Run(run.path).lock()
    opened.release()
    with pytest.raises(ConfigError, match="has done 5 steps"):
        Start.find(wanted).open(wanted, data, steps=4, devices=1)
    run.lock().release()
    new = Start().open(recipe(), data, steps=20, devices=1)
    with pytest.raises(ConfigError, match="another process is training that run"):
        Run(new.path).lock()
    new.release()


def test_a_full_disk_at_resuming_loses_nothing(make_run, recipe, data, monkeypatch):
    run = make_run()
    wanted = recipe(f"resume={run.path}", "trainer.steps=30")

    def full(self, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(
            ConfigError, match=r"^[^\n]* cannot be written: No space left on device[^\n]*resume=auto$"
        ):
            Start.find(wanted).open(wanted, data, steps=30, devices=1)
    assert Start.find(recipe("resume=auto")).run.path == run.path
    Start.find(wanted).open(wanted, data, steps=30, devices=1).release()
    assert Start.find(recipe("resume=auto", "trainer.steps=30")).run.path == run.path


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_run_with_rows_a_step_goes_on_on_other_devices_unedited(make_run, recipe, data, devices):
    rows = ["trainer.rows_per_step=8", "trainer.batch_size=2"]
    run = make_run(*rows, rows_per_step=8)
    wanted = for_devices(recipe("resume=auto", *rows), devices)
    assert wanted.trainer.accumulate == 4 // devices
    said: list[str] = []
    begin = Start.find(wanted)
    assert begin.run.path == run.path
    begin.open(wanted, data, steps=20, devices=devices, say=said.append).release()
    assert said == [f"continuing {run.path} after step 5"]
    saved = Run(run.path).recipe.trainer
    assert (saved.rows_per_step, saved.accumulate) == (8, 1)


def test_what_another_process_has_trained_meanwhile_is_not_thrown_away(make_run, recipe, data):
    run = make_run(step=5)
    begin = Start.find(recipe("resume=auto"))
    shutil.copytree(make_run(step=10).checkpoints.at(10), run.checkpoints.at(10))
    with pytest.raises(ConfigError, match="another process has trained it further meanwhile"):
        begin.open(recipe("resume=auto"), data, 20, 1)
    assert run.checkpoints.last() == run.checkpoints.at(10)


def test_a_tokenizer_that_is_another_under_the_same_data_is_refused(make_run, recipe, data):
    run = make_run()
    run.save_data_fingerprint("abc")
    data.tokenizer = ByteTokenizer()
    data.tokenizer.save(run.path)
    before = (run.path / "tokenizer_config.json").read_bytes()
    begin = Start.find(recipe("resume=auto"))
    begin.open(recipe("resume=auto"), data, 20, 1).release()
    data.tokenizer.pieces = [*data.tokenizer.pieces, b"more"]
    with pytest.raises(ConfigError, match="its tokenizer is not the one that the data have now"):
        begin.open(recipe("resume=auto"), data, 20, 1)
    assert (run.path / "tokenizer_config.json").read_bytes() == before


def test_other_data_are_refused(make_run, recipe, data):
    run = make_run()
    run.save_data_fingerprint("of other documents")
    wanted = recipe(f"resume={run.path}")
    with pytest.raises(ConfigError, match="the documents must have changed since"):
        Start.find(wanted).open(wanted, data, steps=20, devices=1)


def test_a_run_that_is_being_trained_is_left_alone(make_run, recipe, data):
    run = make_run()
    wanted = recipe(f"resume={run.path}")
    begin = Start.find(wanted)
    with run.lock(), pytest.raises(ConfigError, match="another process is training that run"):
        begin.open(wanted, data, steps=20, devices=1)


@pytest.mark.parametrize(
    ("before", "batch_size", "accumulate", "devices", "said"),
    [
        (8, 2, 1, 2, r"8 rows, and here 4 \(.*\); expected trainer\.rows_per_step=8, for as many"),
        (4, 4, 1, 2, r"4 rows, and here 8 \(.*\); expected a trainer\.batch_size that divides 2"),
        (9, 4, 1, 2, r"9 rows, and here 8 \(.*\); expected a number of devices that divides 9"),
    ],
)
def test_a_step_must_have_as_many_rows_as_before(
    make_run, recipe, data, before, batch_size, accumulate, devices, said
):
    run = make_run(rows_per_step=before)
    sizes = [f"trainer.batch_size={batch_size}", f"trainer.accumulate={accumulate}"]
    wanted = recipe(f"resume={run.path}", *sizes)
    with pytest.raises(ConfigError, match=said):
        Start.find(wanted).open(wanted, data, steps=20, devices=devices)
    recipe_before = (run.path / "recipe.yaml").read_text()
    assert "batch_size: 4" in recipe_before, "nothing has changed"


def test_a_run_killed_before_its_result_gets_it_from_its_checkpoint(make_run, recipe):
    run = make_run(step=20, metrics={"valid/loss": 2.0})
    begin = Start.find(recipe("resume=auto"))
    assert not begin.finish(30), "there are steps left"
    assert begin.finish(20)
    assert run.result == {"steps": 20, "valid/loss": 2.0}
    assert not begin.finish(20), "it has its result"


def test_a_run_killed_before_its_last_validation_is_not_finished_so(make_run, recipe):
    run = make_run(step=20)
    assert not Start.find(recipe("resume=auto")).finish(20)
    assert not run.is_finished
    assert not Start().finish(20)


def test_a_checkpoint_keeps_what_a_start_needs(make_run):
    meta = read_meta(make_run().checkpoints.last())
    assert (meta["global_step"], meta["rows_per_step"]) == (5, 4)
    assert meta["recipe"]["model"]["d_model"] == 32


def test_a_run_killed_while_its_only_checkpoint_was_replaced_goes_on(make_run, recipe):
    run = make_run()
    only = run.checkpoints.at(5)
    only.rename(only.with_name(only.name + ".old"))
    assert Start.find(recipe("resume=auto")).checkpoint == only


@pytest.mark.slow
def test_another_number_of_rows_a_step_is_refused_with_what_would_fit(tmp_path, unequal):
    finish(start(*unequal, *layout(1, 4), "trainer.steps=2"))
    (run,) = run_dirs(tmp_path)
    _, err = finish(start(*unequal, *DDP, *layout(2, 4), "trainer.steps=4", f"resume={run}"), code=2)
    assert err.count("error") == 1
    assert "a step of that run has 4 rows, and here 8" in err
    assert "trainer.batch_size that divides 2" in err


def test_a_run_keeps_the_order_of_rows_that_it_began_with(tmp_path):
    assert Start().row_order is None, "a new run chooses"
    assert Start(Run(tmp_path), None, {}).row_order is None, "nothing is trained yet"
    assert Start(Run(tmp_path), tmp_path, {"global_step": 5}).row_order == 1, "of version 0.2"
    assert Start(Run(tmp_path), tmp_path, {"row_order": 2}).row_order == 2


@pytest.mark.slow
def test_the_same_recipe_goes_on_on_two_devices_with_the_same_losses(tmp_path, unequal, monkeypatch):
    rows = [*unequal, "trainer.rows_per_step=4", "trainer.batch_size=2", "trainer.steps=8"]
    finish(start(*rows, "name=whole"))
    interrupt(monkeypatch, [TINY, *rows], step=5)
    out, _ = finish(start(*rows, "strategy.devices=2", "resume=auto"))
    (run,) = run_dirs(tmp_path)
    assert f"continuing {run} after step 5" in out
    assert "accumulate" not in out
    assert_same_curves(run, run_dirs(tmp_path, "whole")[0])
