"""Tables of sweeps, against numbers computed by hand."""

import fcntl
import math

import numpy as np
import pytest

from mixerlab.lm.sweep.folder import Sweep
from mixerlab.lm.sweep.table import FALSE_ALARMS, RESAMPLES, interval, tabulate
from mixerlab.options import ConfigError
from sweeps import begun, fail, finish, made_up


def point(mixer, seed, lr="1e-3", **more):
    return {"model.mixer": mixer, "seed": str(seed), "optim.lr": lr} | more


def two_mixers(folder, a=(0.80, 0.90), b=(0.50, 0.52)):
    settings = [(point("a", i), {"valid__accuracy": value}) for i, value in enumerate(a)]
    settings += [(point("b", i), {"valid__accuracy": value}) for i, value in enumerate(b)]
    return made_up(folder, settings)


def test_mean_and_spread_are_those_over_seeds(tmp_path):
    table = tabulate([two_mixers(tmp_path, a=(0.8, 0.9, 1.0))])
    best, other = table.rows
    assert (best.name, other.name) == ("a", "b")
    assert best.mean("valid/accuracy") == pytest.approx(0.9)
    assert best.values("valid/accuracy").std(ddof=1) == pytest.approx(0.1)
    assert other.mean("valid/accuracy") == pytest.approx(0.51)


def test_the_best_loss_is_the_smallest_and_the_best_accuracy_the_largest(tmp_path):
    results = {"a": (0.9, 1.0), "b": (0.5, 0.4)}
    settings = [
        (point(mixer, seed), {"valid__accuracy": accuracy, "valid__loss": loss})
        for mixer, (accuracy, loss) in results.items()
        for seed in (0, 1)
    ]
    sweep = made_up(tmp_path, settings)
    assert [row.name for row in tabulate([sweep]).rows] == ["a", "b"]
    assert [row.name for row in tabulate([sweep], "valid/loss").rows] == ["b", "a"]


def test_the_learning_rate_is_chosen_on_validation_though_the_test_says_otherwise(tmp_path):
    settings = [
        (point("a", seed, lr), {"valid__accuracy": valid + seed / 100, "test__accuracy": test})
        for lr, valid, test in (("1e-3", 0.7, 0.1), ("3e-3", 0.6, 0.9), ("1e-2", 0.5, 0.8))
        for seed in (0, 1)
    ]
    table = tabulate([made_up(tmp_path, settings)])
    assert table.metric == "test/accuracy"
    assert [row.tuned for row in table.rows] == [{"optim.lr": "1e-3"}]
    assert table.rows[0].mean("test/accuracy") == pytest.approx(0.1)
    assert any("lr with the best mean valid accuracy" in note for note in table.notes)
    assert any("edge" in note and "(1e-3)" in note for note in table.notes)


def test_each_mixer_has_a_learning_rate_of_its_own(tmp_path):
    valid = {("a", "1e-3"): 0.7, ("a", "3e-3"): 0.6, ("b", "1e-3"): 0.2, ("b", "3e-3"): 0.3}
    settings = [
        (point(mixer, seed, lr), {"valid__accuracy": value})
        for (mixer, lr), value in valid.items()
        for seed in (0, 1)
    ]
    rows = tabulate([made_up(tmp_path, settings)]).rows
    assert {row.name: row.tuned["optim.lr"] for row in rows} == {"a": "1e-3", "b": "3e-3"}


def test_a_learning_rate_that_lost_a_seed_is_not_chosen_for_the_others(tmp_path):
    settings = [
        (point("a", 0, "1e-3"), {"valid__accuracy": 0.6}),
        (point("a", 1, "1e-3"), {"valid__accuracy": 0.6}),
        (point("a", 0, "1e-1"), {"valid__accuracy": 0.9}),
        (point("a", 1, "1e-1"), None),  # it diverged
    ]
    (row,) = tabulate([made_up(tmp_path, settings)]).rows
    assert row.tuned == {"optim.lr": "1e-3"}


def test_a_run_that_came_to_no_number_is_never_the_best(tmp_path):
    settings = [
        (point("a", 0, lr), {"valid__loss": value}) for lr, value in (("1e-3", 2.0), ("1e-1", math.nan))
    ]
    (row,) = tabulate([made_up(tmp_path, settings)], "valid/loss").rows
    assert row.tuned == {"optim.lr": "1e-3"}


def test_the_interval_of_two_seeds_is_from_one_to_the_other():
    """Of two values a quarter of the resamples is twice the smaller, and a quarter twice the larger."""
    assert interval(np.array([0.2, 0.6])) == (0.2, 0.6)
    low, high = interval(np.array([0.5, 0.6]), np.array([0.1, 0.3]))  # 1/16 each
    assert (low, high) == pytest.approx((0.2, 0.5))


def test_the_interval_of_many_values_is_that_of_the_normal_distribution():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    half = 1.96 * values.std(ddof=1) / 20
    low, high = interval(values)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


@pytest.mark.parametrize(
    ("b", "said"),
    [
        (
            (0.50, 0.52),
            "a has the best mean valid accuracy, and the intervals of its differences from the others exclude 0",
        ),
        ((0.60, 0.85), "a has the best mean valid accuracy, but is not distinguishable from b"),
    ],
)
def test_a_difference_is_called_where_its_interval_shows_it(tmp_path, b, said):
    (verdict,) = tabulate([two_mixers(tmp_path, b=b)]).verdicts
    assert verdict.startswith(said)


def test_one_seed_shows_no_difference(tmp_path):
    table = tabulate([two_mixers(tmp_path, a=(0.9,), b=(0.1,))])
    assert table.verdicts == ["a has the best mean valid accuracy, but one seed shows no difference"]


@pytest.mark.parametrize("seeds", FALSE_ALARMS)
def test_what_is_said_of_few_seeds_is_so(seeds, tmp_path):
    draws = np.random.default_rng(seeds)
    n = 400
    apart = 0
    for _ in range(n):
        low, high = interval(draws.normal(size=seeds), draws.normal(size=seeds))
        apart += low > 0 or high < 0
    error = math.sqrt(FALSE_ALARMS[seeds] * (1 - FALSE_ALARMS[seeds]) / n)
    assert apart / n == pytest.approx(FALSE_ALARMS[seeds], abs=3.5 * error)
    values = tuple(np.linspace(0, 1, seeds))
    notes = tabulate([two_mixers(tmp_path, values, values)]).notes
    assert any(f"With {seeds} seeds this is weak" in note for note in notes)


def test_settings_are_compared_on_the_same_data_alone(tmp_path):
    settings = [
        ({"data": data, "model.mixer": mixer, "seed": str(seed)}, {"valid__accuracy": value})
        for data, mixer, value in (
            ("mqar", "a", 0.9),
            ("mqar", "b", 0.1),
            ("soup", "a", 0.2),
            ("soup", "b", 0.3),
        )
        for seed in (0, 1)
    ]
    table = tabulate([made_up(tmp_path, settings)])
    assert [(row.context["data"], row.name) for row in table.rows] == [
        ("mqar", "a"),
        ("mqar", "b"),
        ("soup", "b"),
        ("soup", "a"),
    ]
    assert [verdict.partition(" has")[0] for verdict in table.verdicts] == ["mqar: a", "soup: b"]


def test_several_sweeps_stand_beside_each_other(tmp_path):
    sweeps = [two_mixers(tmp_path / "x"), two_mixers(tmp_path / "y", a=(0.1, 0.2))]
    sweeps[1].path = sweeps[1].path.rename(tmp_path / "y" / "other")
    table = tabulate([Sweep.open(sweep.path) for sweep in sweeps])
    assert [(row.context["sweep"], row.name) for row in table.rows] == [
        ("made-up", "a"),
        ("made-up", "b"),
        ("other", "b"),
        ("other", "a"),
    ]


def test_sweeps_of_the_same_name_are_told_apart_by_their_place(tmp_path):
    sweeps = [two_mixers(tmp_path / name) for name in ("x", "y")]
    places = [row.context["sweep"] for row in tabulate(sweeps).rows]
    assert places == [str(sweep.path) for sweep in sweeps for _ in range(2)]


def test_costs_are_those_of_the_runs(tmp_path):
    sweep = made_up(tmp_path, [(point("a", 0), None), (point("a", 1), None)])
    for label, speeds in zip(sweep.points, ([1.0, 10.0, 30.0, 20.0], [1.0, 40.0]), strict=True):
        finish(sweep, label, steps=6, speeds=speeds, valid__accuracy=0.5)
    (row,) = tabulate([sweep]).rows
    assert row.mean("tokens_per_second") == 30.0, "medians without the first: 20 and 40"
    assert row.mean("training_FLOPs") == 6 * 4 * 10.0, "steps, rows, of a row"
    assert row.mean("state_bytes") == 256


def test_learning_curves_are_those_of_validation(tmp_path):
    sweep = made_up(tmp_path, [(point("a", 0), None)])
    finish(
        sweep,
        "p0",
        curve=[("valid/accuracy", {3: 0.2, 6: 0.5}), ("train/loss", {1: 9.0})],
        valid__accuracy=0.5,
    )
    table = tabulate([sweep])
    assert [curve.to_dict() for curve in table.curves.values()] == [{3: 0.2, 6: 0.5}]


def test_what_is_missing_is_said_with_its_reason(tmp_path):
    sweep = begun(tmp_path, "seed=0,1,2,3")
    labels = list(sweep.points)
    finish(sweep, labels[0], valid__accuracy=0.5)
    fail(sweep, labels[1], "stopped: the loss is nan")
    sweep.log_file(labels[2]).write_text("=== begun\nstep 2/6 · loss 3.500 · 1.0k tokens/s\n")
    with sweep.log_file(labels[2]).open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        notes = tabulate([sweep]).notes
    assert "Runs: 1 finished, 1 failed, 1 running, 1 waiting" in notes
    assert f"Missing: {labels[2]} is running, step 2" in notes
    log = sweep.log_file(labels[1])
    assert f"Missing: {labels[1]} is failed: stopped: the loss is nan (log: {log})" in notes


def test_runs_without_the_metric_are_in_no_verdict(tmp_path):
    settings = [({"model.mixer": m, "seed": s}, {"valid__loss": 1.0}) for m in ("a", "b", "c") for s in "01"]
    for i in (0, 1, 4, 5):  # of a and c
        settings[i][1]["test__loss"] = 1.0 + i
    table = tabulate([made_up(tmp_path, settings)], "test/loss")
    assert [row.name for row in table.rows] == ["a", "c", "b"]
    assert "b" not in table.verdicts[0].split()


def test_the_edge_of_what_was_tried_is_said_of_several_sweeps_too(tmp_path):
    tuned = [({"optim.lr": lr, "seed": "0"}, {"valid__loss": float(lr)}) for lr in ("1", "2", "3")]
    other = [({"seed": "0"}, {"valid__loss": 1.0})]
    table = tabulate([made_up(tmp_path, tuned, "one"), made_up(tmp_path, other, "two")])
    assert any(note.startswith("At the edge") for note in table.notes)


def test_it_is_said_where_the_numbers_that_choose_are_those_that_are_shown(tmp_path):
    settings = [({"optim.lr": lr, "seed": "0"}, {"valid__loss": 1.0}) for lr in ("1", "2")]
    notes = tabulate([made_up(tmp_path, settings)]).notes
    assert any("flatter" in note for note in notes)
    for _, result in settings:
        result["test__loss"] = 1.0
    notes = tabulate([made_up(tmp_path, settings, "tested")]).notes
    assert not any("flatter" in note for note in notes)


def test_a_metric_that_no_run_has_is_named(tmp_path):
    with pytest.raises(
        ConfigError, match="--metric valid/accurate: no run has it; did you mean 'valid/accuracy'"
    ):
        tabulate([two_mixers(tmp_path)], "valid/accurate")


def test_without_a_finished_run_there_is_no_table(tmp_path):
    sweep = begun(tmp_path, "seed=0,1")
    fail(sweep, next(iter(sweep.points)))
    with pytest.raises(
        ConfigError, match="no run has finished, so there is no table yet; 1 failed, 1 waiting"
    ):
        tabulate([sweep])


def test_enough_is_drawn_for_the_ends_of_an_interval():
    assert RESAMPLES * 0.025 >= 100
