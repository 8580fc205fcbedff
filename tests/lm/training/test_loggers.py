"""metrics.csv and TensorBoard: what a resumed run keeps, and how runs are compared."""

import csv
import errno
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.start import Start
from mixerlab.lm.training.loggers import CSVMetrics, TensorBoard, compared
from mixerlab.options import ConfigError


def rows(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.csv"


def test_a_new_file_has_a_header_and_a_line_for_each_value(path):
    logger = CSVMetrics(path)
    assert rows(path) == [["step", "metric", "value"]]
    logger.log_metrics({"train/loss": 0.1, "train/accuracy": 1}, step=3)
    logger.log_metrics({"valid/loss": float("nan")}, step=4)
    assert rows(path)[1:] == [
        ["3", "train/loss", "0.1"],
        ["3", "train/accuracy", "1.0"],
        ["4", "valid/loss", "nan"],
    ]


def test_values_keep_every_digit(path):
    CSVMetrics(path).log_metrics({"train/loss": 0.1 + 0.2}, step=1)
    assert float(rows(path)[1][2]) == 0.1 + 0.2


LINES = """\
step,metric,value
9,train/loss,9.0
9,valid/loss,9.5
10,train/loss,10.0
10,speed/tokens_per_second,10.1
10,memory/peak_GiB,10.2
10,valid/loss,10.5
10,valid_mixers/gamma/layer_0_mean,10.6
11,train/loss,11.0
12,tr"""


def resumed(path, tmp_path, validated):
    """The values that are left of LINES where the checkpoint of step 10 is continued."""
    path.write_text(LINES)
    meta = {"global_step": 10, "metrics": {"valid/loss": 10.5} if validated else None}
    CSVMetrics(path, Start(None, tmp_path, meta))
    return [float(row[2]) for row in rows(path)[1:]]


def test_a_resumed_run_drops_the_steps_that_it_repeats(path, tmp_path):
    assert resumed(path, tmp_path, validated=True) == [9.0, 9.5, 10.0, 10.1, 10.2, 10.5, 10.6]


def test_a_validation_that_is_repeated_is_dropped_too(path, tmp_path):
    assert resumed(path, tmp_path, validated=False) == [9.0, 9.5, 10.0, 10.1, 10.2]


@pytest.mark.parametrize(
    "damage",
    [
        '10,"train/loss,1.0',
        "\xb2,train/loss,1.0",
        "9,train/loss,x",
        "\0\ufffd",
        "9,a,b,c",
        "9," + "a" * 200_000,
    ],
)
def test_damaged_lines_are_dropped_alone(path, tmp_path, damage):
    path.write_bytes(LINES.replace("9,valid/loss,9.5", damage).encode() + b"\xff\n")
    CSVMetrics(path, Start(None, tmp_path, {"global_step": 10, "metrics": {"valid/loss": 10.5}}))
    assert [float(row[2]) for row in rows(path)[1:]] == [9.0, 10.0, 10.1, 10.2, 10.5, 10.6]


def test_a_full_disk_is_said_in_one_line_and_leaves_the_file(path, tmp_path, monkeypatch):
    path.write_text(LINES)

    def full(self, text, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(
        ConfigError, match=r"^[^\n]*metrics\.csv cannot be written: No space left on device[^\n]*$"
    ):
        CSVMetrics(path, Start(None, tmp_path, {"global_step": 10}))
    assert path.read_text() == LINES


def test_a_run_that_starts_anew_in_an_old_folder_drops_everything(path):
    path.write_text(LINES)
    CSVMetrics(path, Start())
    assert rows(path) == [["step", "metric", "value"]]


def summaries(folder):
    """Every value in the folder's event files: (step, value)."""
    files = sorted(folder.glob("events.out.*"))
    return [
        (event.step, value)
        for f in files
        for event in EventFileLoader(str(f)).Load()
        for value in event.summary.value
    ]


def comparison(folder):
    """The HPARAMS page: its columns in order, the run's name and its values in them, and the tags of its metrics."""
    data = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for _, value in summaries(folder)
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    experiment = data["_hparams_/experiment"].experiment
    run = data["_hparams_/session_start_info"].session_start_info
    columns = {info.name: info.display_name for info in experiment.hparam_infos}
    values = {columns[name]: v.string_value or v.number_value for name, v in run.hparams.items()}
    shown = [columns[name] for name in sorted(columns)]  # as the page sorts them
    return shown, run.group_name, values, [info.name.tag for info in experiment.metric_infos]


def test_the_metrics_of_a_step_are_one_record(tmp_path):
    logger = TensorBoard(tmp_path, 0)
    logger.log_metrics({"a": 1, "b": 2.5, "c": float("nan")}, 7)
    logger.save()
    (event,) = [
        e for f in tmp_path.glob("events.out.*") for e in EventFileLoader(str(f)).Load() if e.summary.value
    ]
    assert event.step == 7
    assert [value.tag for value in event.summary.value] == ["a", "b", "c"]


def test_the_row_of_a_run_starts_with_what_people_compare(tmp_path):
    recipe = load_recipe("quickstart", ["model.mixer=[mamba2, sessa]", "optim.lr=3e-3"])
    folder = tmp_path / "20260304-1516-mixer=mamba2+sessa"
    logger = TensorBoard(folder, 0)
    logger.log_comparison(compared(recipe, 1_234_567, 10**6), ["valid/bits_per_byte", "valid/loss"])
    logger.save()
    columns, name, values, metrics = comparison(folder)
    assert columns == [
        "mixer",
        "parameters",
        "d_model",
        "n_layers",
        "lr",
        "seed",
        "tokens",
        "block",
        "changed",
    ]
    assert name == folder.name
    assert values["mixer"] == "mamba2+sessa"
    assert values["changed"] == "mixer=mamba2+sessa-lr=0.003"
    assert (values["parameters"], values["lr"], values["tokens"]) == (1_234_567, 0.003, 1e6)
    assert metrics == ["valid/bits_per_byte", "valid/loss"]


def test_the_row_of_a_run_adds_no_point_to_a_curve_and_no_curve_of_its_own(tmp_path):
    logger = TensorBoard(tmp_path, 0)
    logger.log_comparison(compared(load_recipe("quickstart"), 1, 1), ["valid/loss"])
    for step in (10, 20):
        logger.log_metrics({"valid/loss": 1 / step}, step)
    logger.save()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["valid/loss"]
    assert [event.step for event in events.Scalars("valid/loss")] == [10, 20]
    assert not list(tmp_path.rglob("hparams.yaml"))


def test_events_lie_in_the_run_folder_itself(tmp_path):
    logger = TensorBoard(tmp_path / "run", 0)
    logger.log_metrics({"a": 1.0}, 1)
    logger.save()
    assert [path.name.startswith("events.out") for path in (tmp_path / "run").iterdir()] == [True]


def test_text_is_shown_as_it_is(tmp_path):
    logger = TensorBoard(tmp_path, 0)
    logger.log_text("sample", "# no heading\n  def f():\n", 5)
    logger.save()
    ((step, value),) = [(s, v) for s, v in summaries(tmp_path) if v.tag.startswith("sample")]
    assert step == 5
    assert value.tensor.string_val[0].decode() == "    # no heading\n      def f():"


def test_a_resumed_run_purges_the_steps_that_it_repeats(tmp_path):
    for first, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        logger = TensorBoard(tmp_path, first)
        for step in steps:
            logger.log_metrics({"train/loss": first + step / 10}, step)
        logger.save()
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, round(e.value, 1)) for e in events.Scalars("train/loss")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 2.3),
        (4, 2.4),
    ]
