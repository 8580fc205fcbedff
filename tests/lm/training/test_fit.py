"""Whole runs of a tiny recipe: what they write, that they repeat, and that they resume."""

import csv
import io
import json
import math
import multiprocessing
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mixerlab
from mixerlab.data import build_data
from mixerlab.data.text import TokenRows
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import read, read_meta, save
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.batches import Steps, collate_micro_batches
from mixerlab.lm.training.fit import count_steps, report
from mixerlab.lm.training.module import LanguageModel
from mixerlab.options import ConfigError
from tiny_runs import ROOT, TINY, generate, golden_curve, interrupt, metric, run_dirs, train


def test_it_prints_what_a_user_needs_and_no_noise(finished):
    run, done = finished
    for wanted in (
        "step 20/20 · loss",
        "tokens/s",
        "bits per byte",
        "reached",
        str(run),
        "tensorboard --logdir",
        f"mixerlab generate {run} --prompt",
    ):
        assert wanted in done.stdout
    for noise in ("Warning", "GPU available", "💡", "litlogger"):
        assert noise not in done.stdout + done.stderr


def test_the_run_folder_holds_everything(finished):
    run, _ = finished
    for name in ("recipe.yaml", "environment.json", "result.json", "metrics.csv", "tokenizer_config.json"):
        assert (run / name).is_file()
    assert [path.name for path in Run(run).checkpoints.all()] == ["step-00000015", "step-00000020"]
    checkpoints = Run(run).checkpoints
    assert checkpoints.best() == checkpoints.last() == run / "checkpoints" / "step-00000020"
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 20
    assert result["valid/perplexity"] == pytest.approx(math.exp(result["valid/loss"]), rel=1e-5)
    # Every byte is one token; the end of the document has loss and no byte.
    recipe = load_recipe(run / "recipe.yaml")
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    rows = data.val_datasets()["valid"]
    labels = torch.cat([rows[i]["labels"] for i in range(len(rows))])
    labelled = int((labels >= 0).sum())
    expected = result["valid/loss"] * labelled / math.log(2) / (labelled - 1)
    assert result["valid/bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert "torch" in json.loads((run / "environment.json").read_text())


def test_it_learns(finished):
    run, _ = finished
    losses = metric(run, "train/loss")
    assert losses[1] == pytest.approx(math.log(257), abs=0.1)
    assert losses[20] < 3.5
    assert metric(run, "valid/loss")[20] < metric(run, "valid/loss")[10]


def test_tensorboard_holds_everything(finished):
    run, _ = finished
    events = EventAccumulator(str(run)).Reload()
    scalars = set(events.Tags()["scalars"])
    expected = {
        f"{split}/{rate}" for split in ("train", "valid") for rate in ("loss", "perplexity", "bits_per_byte")
    }
    expected |= {"train/learning_rate", "train/gradient_norm", "speed/tokens_per_second", "memory/peak_GiB"}
    expected |= {
        f"valid_mixers/{name}/layer_{layer}_{kind}"
        for name in ("gamma", "feedback_entropy")
        for layer in range(2)
        for kind in ("mean", "spread")
    }
    assert expected <= scalars
    assert all(len(events.Scalars(tag)) > 1 for tag in scalars), "no curve of one point"
    assert not any(tag.startswith(("final/", "watch/", "hparam")) for tag in scalars)
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("valid/loss")] == [10, 20]
    assert {"recipe/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])


def test_the_committed_loss_curve_is_reproduced(finished, tmp_path, options):
    run, _ = finished
    losses = metric(run, "train/loss")
    assert losses == pytest.approx(golden_curve(), abs=1e-4)
    subprocess.run([sys.executable, "train.py", TINY, *options], cwd=ROOT, check=True, capture_output=True)
    assert metric(run_dirs(tmp_path)[0], "train/loss") == losses, "two processes differ"


def test_the_saved_recipe_repeats_the_run(finished, tmp_path, options):
    run, _ = finished
    assert train(run / "recipe.yaml", *options) == 0
    assert metric(run_dirs(tmp_path)[0], "train/loss") == metric(run, "train/loss")


def test_a_run_is_named_after_what_the_command_line_changes(tmp_path, options):
    assert train(TINY, *options, "model.mixer=attention", "trainer.steps=1") == 0
    assert train(TINY, *options, "trainer.steps=1", "label=short") == 0
    first, second = run_dirs(tmp_path)
    assert re.fullmatch(r"\d{8}-\d{4}-mixer=attention-steps=1", first.name)
    assert re.fullmatch(r"\d{8}-\d{4}-short", second.name)


def test_the_end_says_how_to_generate_where_there_is_text(tmp_path, finished):
    for name, tokenizer in (("with", True), ("without", False)):
        run = Run(shutil.copytree(finished[0], tmp_path / name))
        if not tokenizer:
            (run.path / "tokenizer_config.json").unlink()
        console = Console(file=io.StringIO(), width=300)
        report(run, "", console)
        printed = console.file.getvalue()
        assert "after 20 steps: valid loss" in printed
        assert (f"mixerlab generate {run.path}" in printed) == tokenizer


def test_training_from_python_returns_the_finished_run(tmp_path, options):
    console = Console(file=io.StringIO(), width=200)
    run = mixerlab.train(TINY, options, console=console, logging={"every": 2}, trainer={"steps": 8})
    assert run.path == run_dirs(tmp_path)[0]
    assert run.result["steps"] == 8
    assert run.recipe.logging.every == 2
    assert "run folder" in console.file.getvalue()
    table = run.metrics()
    assert list(table["train/loss"].dropna().index) == [1, 2, 4, 6, 8]
    assert table.loc[8, "valid/loss"] == run.result["valid/loss"]
    opened = mixerlab.open_run(run.path)
    assert opened.generate("a", 5) == run.generate("a", 5)


def test_a_recipe_from_python_trains_as_that_from_a_file(options):
    recipe = mixerlab.load_recipe(TINY, options, trainer={"steps": 5, "val_every": 5})
    run = mixerlab.train(recipe, console=Console(quiet=True), optim={"schedule": "constant"})
    again = mixerlab.train(run.path / "recipe.yaml", console=Console(quiet=True))
    assert metric(run.path, "train/loss") == metric(again.path, "train/loss")


def test_from_python_a_run_can_be_continued(options):
    quiet = Console(quiet=True)
    run = mixerlab.train(TINY, options, console=quiet, trainer={"steps": 3})
    more = mixerlab.train(TINY, options, console=quiet, trainer={"steps": 5}, resume=str(run.path))
    assert more.path == run.path
    assert more.result["steps"] == 5


def test_from_python_one_process_trains(options):
    with pytest.raises(ConfigError, match=r"strategy\.devices = 2: from Python one process trains; expected"):
        mixerlab.train(TINY, options, strategy={"name": "ddp", "devices": 2, "accelerator": "cpu"})
    with pytest.raises(ConfigError, match="from Python one process trains"):
        mixerlab.train(TINY, options, strategy={"num_nodes": 2})


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["trainer.accumulate=2", "model.dropout=0.2", "trainer.num_workers=1"],
        ["model.mixer=[gated_deltanet, attention]"],
    ],
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(tmp_path, options, monkeypatch, extra):
    assert train(TINY, *options, *extra) == 0
    interrupt(monkeypatch, [TINY, *options, *extra], step=12)
    assert len(run_dirs(tmp_path)) == 2
    assert train(TINY, *options, *extra, "resume=auto") == 0
    whole, resumed = run_dirs(tmp_path)  # it went on in the same folder
    for name in ("train/loss", "train/gradient_norm", "valid/loss", "train/learning_rate"):
        assert metric(resumed, name) == metric(whole, name)
    with (resumed / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["metric"] == "train/loss"]
    assert steps == [str(i) for i in range(1, 21)], "steps that were repeated are logged once"
    assert generate(resumed, "--max-new-tokens", "3") == 0


def test_a_resumed_run_keeps_its_best_checkpoint_and_its_curves(tmp_path, options, monkeypatch):
    # A learning rate that destroys what was learnt makes the second validation worse than the first.
    arguments = [
        TINY,
        *options,
        "optim.schedule=wsd",
        "optim.final_lr_ratio=1",
        "trainer.checkpoint_every=10",
    ]
    original = LanguageModel.on_validation_epoch_end

    def worse(self):
        if self.trainer.global_step == 20:
            self.valid_metrics[0].sums[0] += 1e6
        original(self)

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_end", worse)
    interrupt(monkeypatch, arguments, step=12)
    assert train(*arguments, "resume=auto") == 0
    (run,) = run_dirs(tmp_path)
    assert read(Run(run).checkpoints.named("best"))["global_step"] == 10
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("valid/loss")] == [10, 20]


def test_the_recipe_of_a_resumed_run_repeats_it(tmp_path, options, monkeypatch):
    interrupt(monkeypatch, [TINY, *options, "trainer.steps=12"], step=7)
    assert train(TINY, *options, "trainer.steps=12", "resume=auto") == 0
    (run,) = run_dirs(tmp_path)
    assert train(run / "recipe.yaml") == 0
    first, second = run_dirs(tmp_path)
    assert metric(first, "train/loss") == metric(second, "train/loss")


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, options, monkeypatch, capsys):
    arguments = [TINY, *options, "trainer.steps=12"]
    interrupt(monkeypatch, arguments, step=7)
    (run,) = run_dirs(tmp_path)
    with Run(run).lock():
        assert train(*arguments, f"resume={run}") == 2
        assert "another process is training that run" in capsys.readouterr().err
        assert train(*arguments, "resume=auto") == 0
    assert len(run_dirs(tmp_path)) == 2


def test_a_run_outlives_its_documents(tmp_path, options):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    arguments = [TINY, *options, f"data.files={text}", "trainer.steps=2"]
    assert train(*arguments) == 0
    text.unlink()
    assert generate(run_dirs(tmp_path)[0], "--max-new-tokens", "3") == 0
    # Nor does an old run whose documents have gone stand in the way of another.
    assert train(TINY, *options, "trainer.steps=2", "resume=auto") == 0


def test_resuming_with_another_optimiser_is_refused(tmp_path, options, capsys):
    assert train(TINY, *options, "trainer.steps=2") == 0
    run = run_dirs(tmp_path)[0]
    assert train(TINY, *options, f"resume={run}", "trainer.steps=4", "optim.lr=1e-5") == 2
    assert "optim.lr was 0.01 and is now 1e-05" in capsys.readouterr().err


def test_auto_says_that_a_run_is_finished(tmp_path, options, capsys):
    short = [*options, "trainer.steps=2"]
    assert train(TINY, *short) == 0
    (run,) = run_dirs(tmp_path)
    result = (run / "result.json").read_text()
    capsys.readouterr()
    assert train(TINY, *short, "resume=auto") == 0
    out = capsys.readouterr().out
    assert "this run is finished" in out
    assert "after 2 steps" in out
    assert run_dirs(tmp_path) == [run]
    assert (run / "result.json").read_text() == result


def test_auto_starts_anew_where_the_recipe_differs_and_says_in_what(tmp_path, options, monkeypatch, capsys):
    interrupt(monkeypatch, [TINY, *options], step=7)
    capsys.readouterr()
    assert train(TINY, *options, "resume=auto", "optim.lr=1e-4", "trainer.steps=2") == 0
    out = capsys.readouterr().out
    assert "no unfinished run of tiny with this recipe; starting a new one" in out
    assert "differs in optim.lr" in out
    assert len(run_dirs(tmp_path)) == 2


def test_resuming_with_another_model_names_the_keys(tmp_path, options, capsys):
    assert train(TINY, *options, "trainer.steps=2") == 0
    run = run_dirs(tmp_path)[0]
    assert train(TINY, *options, f"resume={run}", "model.d_model=48") == 2
    assert "model.d_model was 32 and is now 48" in capsys.readouterr().err


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_continued(
    tmp_path, options, monkeypatch, caplog
):
    assert train(TINY, *options) == 0
    arguments = [TINY, *options, "trainer.keep_checkpoints=1"]
    interrupt(monkeypatch, [*arguments, "trainer.keep_checkpoints=2"], step=17)
    whole, run = run_dirs(tmp_path)
    last = Run(run).checkpoints.named("last")
    (last / "state.ckpt").write_bytes((last / "state.ckpt").read_bytes()[:-1])
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("keep_checkpoints: 2", "keep_checkpoints: 1")
    )
    (run / "checksums.json").unlink()  # which accepts the change
    assert train(*arguments, "resume=auto") == 0
    assert "step-00000015 is damaged: state.ckpt has" in caplog.text
    assert run_dirs(tmp_path) == [whole, run]
    assert metric(run, "train/loss") == metric(whole, "train/loss")
    assert Run(run).checkpoints.all() == [run / "checkpoints" / "step-00000020"]


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(
    finished, tmp_path, options, monkeypatch, capsys
):
    wide = [TINY, *options, "model.d_model=48"]
    interrupt(monkeypatch, wide, step=7)
    (run,) = run_dirs(tmp_path)
    shutil.copytree(finished[0] / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000020")
    for tool, arguments in ((train, [*wide, "resume=auto"]), (generate, [run])):
        assert tool(*arguments) == 2
        said = "step-00000020 is of another recipe: model.d_model is 32 there and 48 in the recipe"
        assert said in capsys.readouterr().err


def test_a_run_that_was_killed_just_before_its_result_gets_it(tmp_path, options, capsys):
    assert train(TINY, *options) == 0
    (run,) = run_dirs(tmp_path)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    assert train(TINY, *options, "resume=auto") == 0
    assert json.loads((run / "result.json").read_text()) == pytest.approx(result)
    assert "after 20 steps" in capsys.readouterr().out
    assert run_dirs(tmp_path) == [run]


def test_resuming_a_run_that_is_at_its_end_says_so(tmp_path, options, capsys):
    assert train(TINY, *options, "trainer.steps=2") == 0
    run = run_dirs(tmp_path)[0]
    assert train(TINY, *options, f"resume={run}", "trainer.steps=2") == 2
    assert "that run has done 2 steps, and this recipe ends after 2" in capsys.readouterr().err
    assert (run / "result.json").exists()


def test_resuming_with_other_documents_is_refused(tmp_path, options, capsys):
    text = tmp_path / "text.txt"
    bpe = [f"data.files=[{text}]"]
    text.write_text("to be or not to be, that is the question\n" * 200)
    assert train(TINY, *options, *bpe, "trainer.steps=2") == 0
    run = run_dirs(tmp_path)[0]
    text.write_text("whether it is nobler in the mind to suffer\n" * 200)
    assert train(TINY, *options, *bpe, f"resume={run}", "trainer.steps=4") == 2
    assert "the documents must have changed since" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps(tmp_path, options, capsys):
    assert train(TINY, *options, "trainer.steps=4") == 0
    run = run_dirs(tmp_path)[0]
    assert train(TINY, *options, f"resume={run}", "trainer.steps=6") == 0
    assert "trainer.steps: was 4, now 6" in capsys.readouterr().out
    assert run_dirs(tmp_path) == [run]
    assert sorted(metric(run, "train/loss")) == [1, 2, 3, 4, 5, 6]


def stop_in_the_validation(monkeypatch, arguments, step):
    """Trains until a signal arrives while the validation of `step` is at its second batch."""
    validating = []
    validation_step, largest = LanguageModel.validation_step, World.max

    def noted(self, batch, batch_idx, *loader):
        if self.trainer.global_step == step:
            validating.append(batch_idx)
        return validation_step(self, batch, batch_idx, *loader)

    def signalled(self, received, *others):
        return largest(self, int(signal.SIGTERM) if validating else received, *others)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "validation_step", noted)
        patched.setattr(World, "max", signalled)
        assert train(*arguments) == 75
    assert validating == [0]


def test_a_validation_that_was_interrupted_is_made_up_for(tmp_path, options, monkeypatch):
    arguments = [TINY, *options, "trainer.batch_size=2"]
    assert train(*arguments) == 0
    stop_in_the_validation(monkeypatch, arguments, step=10)
    whole, stopped = run_dirs(tmp_path)
    last = Run(stopped).checkpoints.last()
    assert (read_meta(last)["global_step"], read_meta(last)["metrics"]) == (10, None)
    assert metric(stopped, "valid/loss") == {}
    assert train(*arguments, "resume=auto") == 0
    assert run_dirs(tmp_path) == [whole, stopped]
    for name in ("train/loss", "valid/loss"):
        assert metric(stopped, name) == metric(whole, name)
    with (stopped / "metrics.csv").open() as file:
        rows = [tuple(line.split(",")[:2]) for line in file]
    assert len(rows) == len(set(rows)), "nothing is logged twice"


def test_a_validation_that_is_made_up_for_writes_no_checkpoint_anew(tmp_path, options, monkeypatch):
    arguments = [TINY, *options, "trainer.batch_size=2", "trainer.steps=12"]
    stop_in_the_validation(monkeypatch, arguments, step=10)
    (run,) = run_dirs(tmp_path)
    file = Run(run).checkpoints.last() / "state.ckpt"
    before = file.stat()
    assert train(*arguments, "resume=auto") == 0
    assert (before.st_ino, before.st_mtime_ns) == (file.stat().st_ino, file.stat().st_mtime_ns)


def into_the_old_form(run, step):
    """Rewrites a run as version 0.1 left it, killed after `step`: names, Lightning's progress, its schedulers."""
    old_names = {"mlp_dim": "mlp_width", "head_dim": "head_width", "rope_theta": "rope_base"}

    def renamed(tree):
        if isinstance(tree, dict):
            return {old_names.get(key, key): renamed(value) for key, value in tree.items()}
        return [renamed(item) for item in tree] if isinstance(tree, list) else tree

    recipe = yaml.safe_load((run.path / "recipe.yaml").read_text())
    recipe = {key: value for key, value in renamed(recipe).items() if key != "label"}
    (run.path / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    run.checkpoints.set_aside_after(step)
    state = read(run.checkpoints.at(step))
    accumulate, lr = recipe["trainer"]["accumulate"], recipe["optim"]["lr"]
    for group in state["optimizer_states"][0]["param_groups"]:
        group["initial_lr"] = lr
    steps = {"ready": step, "completed": step}
    batches = dict.fromkeys(("ready", "completed", "started", "processed"), step * accumulate)
    none = {"ready": 0, "completed": 0}
    fit_loop = {
        "state_dict": {},
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1},
        "epoch_loop.batch_progress": {"total": batches, "current": batches, "is_last_batch": False},
        "epoch_loop.scheduler_progress": {"total": steps, "current": steps},
        "epoch_loop.automatic_optimization.optim_progress": {
            "optimizer": {"step": {"total": steps, "current": steps}}
        },
        "epoch_loop.manual_optimization.optim_step_progress": {"total": none, "current": none},
    }
    scheduler = {
        "base_lrs": [lr, lr],
        "last_epoch": step,
        "_step_count": step + 1,
        "lr_lambdas": [None, None],
    }
    state |= {"loops": {"fit_loop": fit_loop}, "lr_schedulers": [scheduler], "recipe": recipe}
    save(state, run.checkpoints.at(step))
    environment = json.loads((run.path / "environment.json").read_text())
    del environment["started"], environment["number"]
    (run.path / "environment.json").write_text(json.dumps(environment))
    (run.path / "checksums.json").unlink()
    (run.path / "result.json").unlink()
    return run.path.rename(run.path.with_name("20250102-030405"))


def test_a_run_of_an_older_version_goes_on_as_if_nothing_had_happened(tmp_path, options, capsys):
    changed = [
        "trainer.accumulate=2",
        "model.dropout=0.1",
        "model.block=transformer",
        "model.mlp_dim=40",
        "model.mixer=[{name: mamba2, head_dim: 8}, {name: attention, rope_theta: 500.0}]",
    ]
    assert train(TINY, *options, *changed) == 0
    (run,) = run_dirs(tmp_path)
    whole = {name: metric(run, name) for name in ("train/loss", "train/learning_rate", "valid/loss")}
    old = into_the_old_form(Run(run), step=15)
    written = (old / "recipe.yaml").read_text()
    assert all(name in written for name in ("mlp_width: 40", "head_width: 8", "rope_base: 500.0"))
    assert "label" not in written
    capsys.readouterr()
    assert train(TINY, *options, *changed, "resume=auto") == 0
    assert f"continuing {old} after step 15" in capsys.readouterr().out
    assert run_dirs(tmp_path) == [old]
    assert {name: metric(old, name) for name in whole} == whole
    assert "mlp_dim: 40" in (old / "recipe.yaml").read_text()
    assert "loops" not in read(Run(old).checkpoints.last())


def test_the_first_step_has_the_gradient_of_the_mean_over_all_labels(tmp_path, options, packed):
    changed = [*options, *packed, "trainer.steps=1", "trainer.batch_size=8"]
    recipe = load_recipe(TINY, changed)
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    rows = data.train_dataset()
    (batch,) = collate_micro_batches([rows[i] for i in Steps(recipe.seed, len(rows), 8).rows(0)], 8)
    decoder = make_decoder(recipe, data.vocab_size)
    nll, _ = decoder(batch["input_ids"], batch["labels"], batch["segment_ids"])
    (nll.sum() / (batch["labels"] >= 0).sum()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters() if p.grad is not None])
    for layout in (["trainer.batch_size=8"], ["trainer.batch_size=2", "trainer.accumulate=4"]):
        assert train(TINY, *changed, *layout) == 0
        assert metric(run_dirs(tmp_path)[-1], "train/gradient_norm")[1] == pytest.approx(
            float(norm), rel=1e-5
        )


def test_accumulated_micro_batches_give_the_step_of_one_batch(tmp_path, options, packed):
    extra = [*packed, "optim.grad_clip=0.5"]
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        sizes = [f"trainer.batch_size={batch_size}", f"trainer.accumulate={accumulate}"]
        assert train(TINY, *options, *extra, *sizes) == 0
    whole, *others = (metric(run, "train/loss") for run in run_dirs(tmp_path))
    for losses in others:
        assert losses == pytest.approx(whole, abs=1e-5)


def test_a_penalty_added_in_the_backward_pass_does_not_depend_on_the_accumulation(
    tmp_path, options, monkeypatch
):
    # Rows that are all the same, and gates without noise: each micro-batch has the same share of attending positions.
    (tmp_path / "same.txt").write_text("a" * 5000)
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda drawn: drawn.fill_(1))
    norms = []
    for weight, batch_size, accumulate in ((3.0, 4, 1), (3.0, 1, 4), (0.0, 4, 1)):
        mixer = f"{{name: selective_attention, below: attention, penalty_weight: {weight}}}"
        changed = [f"model.mixer={mixer}", f"data.files=[{tmp_path / 'same.txt'}]", "trainer.steps=3"]
        sizes = [f"trainer.batch_size={batch_size}", f"trainer.accumulate={accumulate}"]
        assert train(TINY, *options, *changed, *sizes) == 0
        norms.append(metric(run_dirs(tmp_path)[-1], "train/gradient_norm"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2][1] != pytest.approx(norms[0][1], rel=0.01), "the penalty has a part in it"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_learns_and_keeps_gains_in_float32(tmp_path, options, precision):
    assert train(TINY, *options, f"trainer.precision={precision}") == 0
    run = run_dirs(tmp_path)[0]
    assert metric(run, "train/loss")[20] == pytest.approx(golden_curve()[20], abs=0.15)
    weights = read(Run(run).checkpoints.named("last"))["state_dict"]
    low = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert weights["decoder.blocks.0.mixer.proj_fb.weight"].dtype == low
    assert weights["decoder.blocks.0.mixer.gamma_bias"].dtype == torch.float32
    assert generate(run, "--max-new-tokens", "4") == 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(tmp_path, options):
    assert train(TINY, *options, "strategy.compile=true") == 0
    assert metric(run_dirs(tmp_path)[0], "train/loss") == pytest.approx(golden_curve(), abs=1e-3)


@pytest.mark.parametrize("block", ["gated", "transformer"])
@pytest.mark.parametrize(
    "mixer", ["identity", "attention", "sessa", "[attention, {name: sessa, n_feedback_heads: 2}]"]
)
def test_any_mixer_trains_in_any_block(tmp_path, options, mixer, block):
    changed = [f"model.mixer={mixer}", f"model.block={block}", "model.norm=rmsnorm", "trainer.steps=8"]
    assert train(TINY, *options, *changed) == 0
    losses = metric(run_dirs(tmp_path)[0], "train/loss")
    assert losses[8] < losses[1] - 0.5


@pytest.mark.parametrize(
    ("horizon", "steps"), [("steps=7", 7), ("epochs=1.5", 15), ("epochs=0.01", 1), ("tokens=1e4", 20)]
)
def test_the_horizon_in_steps(horizon, steps):
    recipe = load_recipe(TINY, [f"trainer.{horizon}", "trainer.accumulate=2"])  # 8 rows of 64 tokens per step
    assert count_steps(recipe, n_rows=80, seq_len=64) == steps


def test_processes_of_the_program_that_trains_outlive_the_training(options):
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=[60])
    other.start()
    try:
        mixerlab.train(TINY, options, trainer={"steps": 1}, console=Console(quiet=True))
        assert other.is_alive()
    finally:
        other.kill()


def test_text_in_brackets_is_printed_as_it_is(tmp_path, options, capsys):
    prompt = "logging.sample_prompt='[INST] hi [/INST]'"
    assert train(TINY, *options, "trainer.steps=1", prompt, "label='[mine]'") == 0
    printed = capsys.readouterr().out
    assert "[INST] hi [/INST]" in printed
    assert str(run_dirs(tmp_path)[0]) in printed


def test_a_continuation_that_cannot_start_leaves_the_run_as_it_was(tmp_path, options, capsys):
    assert train(TINY, *options, "trainer.steps=2") == 0
    run = run_dirs(tmp_path)[0]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    mistake = "strategy={name: fsdp, replicate: 3}"
    assert train(TINY, *options, f"resume={run}", "trainer.steps=4", mistake) == 2
    assert "strategy.replicate = 3: it must divide the number of devices, 1" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_step_without_labels_says_so(tmp_path, options, monkeypatch, capsys):
    get = TokenRows.__getitem__

    def unlabelled(rows, i):
        row = get(rows, i)
        return {**row, "labels": torch.full_like(row["labels"], -100)}

    monkeypatch.setattr(TokenRows, "__getitem__", unlabelled)
    assert train(TINY, *options, "trainer.steps=1") == 1
    assert "no position of the step's rows has one" in capsys.readouterr().err
