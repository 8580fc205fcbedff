"""Experiment trackers: Weights & Biases without a network, MLflow on files; what goes there, and runs that go on."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.figure import Figure
from mlflow import MlflowClient
from rich.console import Console

from mixerlab import train
from mixerlab.__main__ import main
from mixerlab.lm.memory.plots import png
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.loggers import MlflowConfig, WandbConfig
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start
from mixerlab.lm.training.loggers import Board, CSVMetrics, TensorBoard, make_loggers
from mixerlab.lm.training.trackers import Mlflow, Wandb
from mixerlab.options import ConfigError
from started_runs import finish, layout, start
from tiny_runs import TINY, metric, run_dirs
from wandb_files import wandb_config, wandb_curve, wandb_files, wandb_history, wandb_run

VALUES = {"mixer": "sessa", "parameters": 12, "lr": 0.1}
NAME = "20260102-0304-mixer={name: sessa}"
WANDB = "{name: wandb, project: p, entity: e, tags: [a], offline: true}"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("WANDB_PROJECT", raising=False)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "runs" / NAME
    path.mkdir(parents=True)
    return path


@pytest.fixture
def picture():
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    return png(figure)


def use(logger, picture, first):
    logger.log_text("recipe", "model:\n  <mixer>: 1", first)
    logger.log_comparison(VALUES, ["valid/loss"])
    for step in (first + 1, first + 2):
        logger.log_metrics({"train/loss": step / 10, "valid/loss": float("nan")}, step=step)
    logger.log_picture("influence", picture, first + 2)
    logger.finalize("success")


def test_wandb_has_a_run_of_the_folders_name_that_goes_on(folder, picture):
    config = WandbConfig(project="p", tags=["a", "b"], offline=True)
    for first in (0, 2):
        use(Wandb(config, "tiny", folder), picture, first)
    files = wandb_files(folder)
    assert len(files) == 2
    for path, first in zip(files, (0, 2), strict=True):
        run = wandb_run(path)
        assert (run.project, run.display_name, run.run_group, list(run.tags)) == (
            "p",
            NAME,
            "tiny",
            ["a", "b"],
        )
        assert run.run_id == "tiny-20260102-0304-mixer=-name-sessa-", (
            "no colon, brace or space is allowed there"
        )
        assert wandb_curve(path, "train/loss") == {first + 1: (first + 1) / 10, first + 2: (first + 2) / 10}
        assert wandb_config(path).items() >= VALUES.items()
        shown = {
            key: row["trainer/global_step"] for row in wandb_history(path) for key in row if "/_type" in key
        }
        assert shown == {"recipe/_type": first, "influence/_type": first + 2}
        (image,) = path.parent.glob("files/media/images/*.png")
        assert image.read_bytes() == picture
        (text,) = path.parent.glob("files/media/html/*.html")
        assert "<pre>model:\n  &lt;mixer&gt;: 1</pre>" in text.read_text()


def test_each_run_of_a_process_has_its_own_in_wandb(tmp_path, picture):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        use(Wandb(WandbConfig(offline=True), "tiny", tmp_path / name), picture, 0)
    runs = [wandb_run(path) for name in ("one", "two") for path in wandb_files(tmp_path / name)]
    assert [(run.run_id, run.project) for run in runs] == [("tiny-one", "mixerlab"), ("tiny-two", "mixerlab")]


def mlflow_config(tmp_path):
    return MlflowConfig(tracking_uri=f"file:{tmp_path / 'mlflow'}")


def mlflow_runs(tmp_path, experiment="tiny"):
    client = MlflowClient(f"file:{tmp_path / 'mlflow'}")
    found = client.get_experiment_by_name(experiment)
    return client, [] if found is None else client.search_runs([found.experiment_id])


def test_mlflow_has_a_run_of_the_folders_name_that_goes_on(folder, tmp_path, picture):
    use(Mlflow(mlflow_config(tmp_path), "tiny", folder, goes_on=False), picture, 0)
    going = Mlflow(mlflow_config(tmp_path), "tiny", folder, goes_on=True)
    client, (run,) = mlflow_runs(tmp_path)
    assert run.info.status == "RUNNING"
    use(going, picture, 2)
    client, (run,) = mlflow_runs(tmp_path)
    assert (run.info.run_name, run.info.status) == (NAME, "FINISHED")
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert run.data.params == {"mixer": "sessa", "parameters": "12", "lr": "0.1"}
    artifacts = tmp_path / "mlflow" / run.info.experiment_id / run.info.run_id / "artifacts"
    assert (artifacts / "recipe" / "00000002.txt").read_text() == "model:\n  <mixer>: 1"
    assert (artifacts / "influence" / "00000004.png").read_bytes() == picture


def test_another_run_of_that_name_is_another_in_mlflow(folder, tmp_path, picture):
    for _ in range(2):
        use(Mlflow(mlflow_config(tmp_path), "tiny", folder, goes_on=False), picture, 0)
    assert len(mlflow_runs(tmp_path)[1]) == 2


@pytest.mark.parametrize("what", ["log_batch", "log_artifact", "get_run", "set_terminated"])
def test_a_server_that_goes_stops_no_training(folder, tmp_path, picture, monkeypatch, caplog, what):
    logger = Mlflow(mlflow_config(tmp_path), "tiny", folder, goes_on=False)

    def gone(*arguments, **options):
        raise ConnectionError("the server has gone")

    monkeypatch.setattr(logger.experiment, what, gone)
    with caplog.at_level(logging.WARNING, "mixerlab"):
        use(logger, picture, 0)
    said = [record.getMessage() for record in caplog.records if record.name == "mixerlab"]
    assert said == ["Mlflow: logging fails, and the run goes on: the server has gone"]


@pytest.mark.slow
def test_a_run_is_followed_in_every_tracker_and_goes_on_there(options, tmp_path):
    uri = f"file:{tmp_path / 'mlflow'}"
    loggers = f"logging.loggers=[{WANDB}, {{name: mlflow, tracking_uri: '{uri}'}}, tensorboard]"
    arguments = [*options, *layout(2, 2), loggers, "logging.memory_every=1"]
    finish(start(*arguments, "trainer.steps=7", "trainer.val_every=5"))
    (run,) = run_dirs(tmp_path)
    finish(start(*arguments, "trainer.steps=12", f"resume={run}"))
    client, (tracked,) = mlflow_runs(tmp_path)
    first, second = wandb_files(run)
    assert wandb_run(first).run_id == wandb_run(second).run_id == f"tiny-{run.name}"
    assert (wandb_run(first).entity, tracked.info.run_name) == ("e", run.name)
    for name in ("train/loss", "valid/loss", "speed/tokens_per_second"):
        there = {m.step: m.value for m in client.get_metric_history(tracked.info.run_id, name)}
        assert there == metric(run, name) == wandb_curve(first, name) | wandb_curve(second, name)
    assert set(metric(run, "train/loss")) == set(range(1, 13))
    artifacts = tmp_path / "mlflow" / tracked.info.experiment_id / tracked.info.run_id / "artifacts"
    shown = {kind: sorted(p.stem for p in (artifacts / kind).iterdir()) for kind in ("sample", "influence")}
    assert [*shown.values()] == [["00000005", "00000007", "00000010", "00000012"]] * 2
    for kind in shown:
        steps = [
            row["trainer/global_step"]
            for path in (first, second)
            for row in wandb_history(path)
            if f"{kind}/_type" in row
        ]
        assert steps == [5, 7, 10, 12]
    assert list(run.glob("events.out.*"))


@pytest.mark.slow
def test_what_is_not_named_is_not_imported(options):
    code = (
        "import sys; from mixerlab import train; import mixerlab.lm.training.trackers; "
        f"train({TINY!r}, {options!r}, trainer={{'steps': 2}}); "
        "assert not {'wandb', 'mlflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_metrics_go_to_their_file_whatever_is_named(options, tmp_path):
    run = train(TINY, [*options, "logging.loggers=[]"], trainer={"steps": 2}, console=Console(quiet=True))
    assert len(metric(run.path, "train/loss")) == 2
    assert not list(run.path.glob("events.out.*"))


def test_of_all_loggers_metrics_csv_alone_takes_no_pictures(folder):
    made = make_loggers(load_recipe("quickstart"), Run(folder), Start())
    assert [type(logger) for logger in made] == [TensorBoard, CSVMetrics]
    assert [isinstance(logger, Board) for logger in made] == [True, False]
    assert not isinstance(TensorBoardLogger(folder), Board)


def test_a_run_may_go_on_with_other_loggers(options, tmp_path):
    said = Console(quiet=True)
    first = train(TINY, [*options, "trainer.max_time=1000s"], trainer={"steps": 2}, console=said)
    first.reopen()
    more = train(TINY, [*options, "resume=auto", "logging.loggers=[]"], trainer={"steps": 2}, console=said)
    assert more.path == first.path


def refusal(capsys, loggers, *more):
    assert main(["train", TINY, f"logging.loggers={loggers}", *more]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line.removeprefix("error: ").rstrip("\n")


WRONG = {
    "[wanbd]": "logging.loggers[0] = 'wanbd': no such logger; did you mean 'wandb'? valid: tensorboard, wandb, mlflow",
    "[tensorboard, {project: p}]": "logging.loggers[1] = {'project': 'p'}: expected a logger's name, or a mapping with "
    "`name` and options; valid: tensorboard, wandb, mlflow",
    "[3]": "logging.loggers[0] = 3: expected a logger's name, or a mapping",
    "[tensorboard, {name: wandb, projekt: p}]": "logging.loggers[1].projekt = 'p': no such key; did you mean 'proj",
    "[{name: wandb, offline: yes please}]": "logging.loggers[0].offline = 'yes please': expected true or false",
    "[{name: tensorboard, dir: x}]": "logging.loggers[0].dir = 'x': no such key",
    "[mlflow, wandb, mlflow]": "logging.loggers[2] = 'mlflow': expected each logger once",
}


@pytest.mark.parametrize(("loggers", "said"), WRONG.items(), ids=WRONG)
def test_wrong_names_and_options_are_refused(at_the_root, capsys, loggers, said):
    assert refusal(capsys, loggers).startswith(said)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_without_the_extra_it_is_named_before_anything_is_made(options, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    said = refusal(capsys, f"[tensorboard, {name}]", *options)
    assert said == (
        f"logging.loggers[1] = '{name}': No module named '{name}'; expected it installed: "
        f"pip install 'mixerlab[{name}]'"
    )
    assert not Path(tmp_path, "runs").exists()


def test_a_tracker_that_cannot_begin_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "false")
    recipe = load_recipe(
        "quickstart", [f"logging.loggers=[{{name: mlflow, tracking_uri: 'file:{tmp_path / 'mlflow'}'}}]"]
    )
    with pytest.raises(ConfigError, match=r"^logging\.loggers\[0\] = 'mlflow': it cannot begin: [^\n]*$"):
        make_loggers(recipe, Run(folder), Start())
