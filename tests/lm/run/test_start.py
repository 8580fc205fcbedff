"""What a run begins from: which run goes on, and which changes it bears."""

from types import SimpleNamespace

import pytest

from mixerlab.lm.run.checkpoint import read_meta
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start
from mixerlab.options import ConfigError
from started_runs import DDP, finish, layout, start
from tiny_runs import run_dirs


@pytest.fixture
def data():
    """As much of a data module as a start looks at."""
    return SimpleNamespace(fingerprint="abc", save_tokenizer=lambda folder: None)


def test_without_resume_nothing_is_continued(make_run, recipe):
    make_run()
    begin = Start.find(recipe())
    assert begin == Start()
    assert begin.step == 0
    assert begin.is_validated


def test_auto_takes_the_newest_unfinished_run_of_the_same_recipe(make_run, recipe):
    older = make_run()
    newer, other, finished, locked = make_run(step=6), make_run("optim.lr=1"), make_run(), make_run()
    Run.create(recipe())  # has no checkpoint
    finished.finish(5, {})
    with locked.lock():
        begin = Start.find(recipe("resume=auto"))
    assert begin.run.path == newer.path
    assert begin.step == 6
    assert begin.checkpoint == newer.checkpoints.at(6)
    newer.finish(6, {})
    locked.finish(5, {})
    assert Start.find(recipe("resume=auto")).run.path == older.path
    assert Start.find(recipe("resume=auto", "optim.lr=1")).run.path == other.path
    assert Start.find(recipe("resume=auto", "seed=9")) == Start()


def test_auto_does_not_stumble_over_a_run_that_cannot_be_read(make_run, recipe):
    wanted, broken = make_run(), make_run()
    path = broken.path / "recipe.yaml"
    path.write_text(path.read_text() + "key_of_a_version_to_come: 3\n")
    assert Start.find(recipe("resume=auto")).run.path == wanted.path


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
        (8, 2, 1, 2, r"8 rows, and here 4 \(.*\); expected trainer\.accumulate=2, for as many"),
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
