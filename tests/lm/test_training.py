"""Whole runs of a tiny recipe: what they write, that they repeat, and that they resume."""

import csv
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
from mixerlab.lm.batches import Batches
from mixerlab.lm.checkpoint import best_checkpoint, last_checkpoint, list_checkpoints, named_checkpoint, read
from mixerlab.lm.config import load_recipe
from mixerlab.lm.module import LanguageModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

import train
from mixerlab.lm import generate
from mixerlab.lm.run import build_decoder, lock_run, make_data
from mixerlab.lm.training import count_steps, make_decoder
from tests.lm.tiny_runs import ROOT, TINY, metric, run_dirs

CURVE = ROOT / "tests" / "golden" / "tiny.json"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def options(tmp_path):
    return [f"logging.dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path / 'cache'}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of the tiny recipe and what it printed."""
    folder = tmp_path_factory.mktemp("finished")
    command = [sys.executable, "train.py", TINY]
    overrides = [f"logging.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]
    done = subprocess.run([*command, *overrides], cwd=ROOT, capture_output=True, text=True, check=True)
    return run_dirs(folder)[0], done


def test_it_prints_what_a_user_needs_and_no_noise(finished):
    run, done = finished
    for wanted in (
        "step 20/20 · loss",
        "tokens/s",
        "bits per byte",
        "reached",
        str(run),
        "tensorboard --logdir",
    ):
        assert wanted in done.stdout
    for noise in ("Warning", "GPU available", "💡", "litlogger"):
        assert noise not in done.stdout + done.stderr


def test_the_run_folder_holds_everything(finished):
    run, _ = finished
    for name in ("recipe.yaml", "environment.json", "result.json", "metrics.csv", "tokenizer_config.json"):
        assert (run / name).is_file()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000015", "step-00000020"]
    assert best_checkpoint(run) == last_checkpoint(run) == run / "checkpoints" / "step-00000020"
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 20
    assert result["valid/perplexity"] == pytest.approx(math.exp(result["valid/loss"]), rel=1e-5)
    # Every byte is one token; the end of the document has loss and no byte.
    data = make_data(load_recipe(run / "recipe.yaml"))
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
        f"watch/{name}/layer_{layer}_{kind}"
        for name in ("gamma", "feedback_entropy")
        for layer in range(2)
        for kind in ("mean", "spread")
    }
    assert expected <= scalars
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("valid/loss")] == [10, 20]
    assert {"recipe/text_summary", "sample/text_summary"} <= set(events.Tags()["tensors"])


def test_the_committed_loss_curve_is_reproduced(finished, tmp_path, options):
    run, _ = finished
    committed = {int(step): loss for step, loss in json.loads(CURVE.read_text()).items()}
    losses = metric(run, "train/loss")
    assert losses == pytest.approx(committed, abs=1e-4)
    subprocess.run([sys.executable, "train.py", TINY, *options], cwd=ROOT, check=True, capture_output=True)
    assert metric(run_dirs(tmp_path)[0], "train/loss") == losses, "two processes differ"


def test_the_saved_recipe_repeats_the_run(finished, tmp_path, options):
    run, _ = finished
    assert train.main([str(run / "recipe.yaml"), *options]) == 0
    assert metric(run_dirs(tmp_path)[0], "train/loss") == metric(run, "train/loss")


def test_text_is_generated_from_the_run_folder(finished, capsys):
    run, _ = finished
    arguments = [str(run), "--prompt", "License", "--prompt", "a", "--max-new-tokens", "12", "--seed", "3"]
    texts = []
    for _ in range(2):
        assert generate.main(arguments) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert "--- prompt 1 of 2\nLicense" in texts[0]
    assert "--- prompt 2 of 2\na" in texts[0]
    assert generate.main([str(run), "--checkpoint", "best", "--max-new-tokens", "3"]) == 0


def test_generating_from_a_checkpoint_that_was_never_written_says_so(finished, tmp_path, capsys):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step-00000020")  # the other one was not validated
    assert generate.main([str(run), "--checkpoint", "best"]) == 2
    assert "none was validated; that run has checkpoints of steps 15\n" in capsys.readouterr().err
    assert generate.main([str(run), "--checkpoint", "7"]) == 2
    assert "no such checkpoint; that run has checkpoints of steps 15\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["--dry-run"]])
def test_a_backend_that_cannot_run_here_gets_one_clear_line(options, capsys, command):
    mixer = "model.mixer={name: mamba2, backend: mamba_ssm}"
    assert train.main(["tests/golden/tiny.yaml", mixer, *options, *command]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ssd: backend 'mamba_ssm' cannot take this input: x is on device cpu")


@pytest.mark.parametrize("damage", ["missing", "truncated", "no folder"])
def test_generating_from_a_broken_run_says_what_is_wrong(finished, tmp_path, capsys, damage):
    run = tmp_path / "run"
    if damage != "no folder":
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.yaml").write_text((finished[0] / "recipe.yaml").read_text())
    if damage == "truncated":
        folder = shutil.copytree(
            named_checkpoint(finished[0], "last"), run / "checkpoints" / "step-00000020", dirs_exist_ok=True
        )
        whole = (folder / "state.ckpt").read_bytes()
        (folder / "state.ckpt").write_bytes(whole[: len(whole) // 2])
    assert generate.main([str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    expected = {
        "missing": "no checkpoints/step-",
        "truncated": "state.ckpt has",
        "no folder": "no such folder",
    }
    assert expected[damage] in error


@pytest.mark.parametrize(
    "extra", [[], ["trainer.accumulate=2", "model.dropout=0.2", "trainer.num_workers=1"]]
)
def test_an_interrupted_run_continues_as_if_nothing_had_happened(tmp_path, options, monkeypatch, extra):
    assert train.main([TINY, *options, *extra]) == 0
    step = LanguageModel.training_step

    def stop_at_13(self, batch, batch_idx):
        if self.trainer.global_step == 12:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "training_step", stop_at_13)
        assert train.main([TINY, *options, *extra]) == 130
    assert len(run_dirs(tmp_path)) == 2
    assert train.main([TINY, *options, *extra, "resume=auto"]) == 0
    whole, resumed = run_dirs(tmp_path)  # it went on in the same folder
    for name in ("train/loss", "train/gradient_norm", "valid/loss", "train/learning_rate"):
        assert metric(resumed, name) == metric(whole, name)
    with (resumed / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["metric"] == "train/loss"]
    assert steps == [str(i) for i in range(1, 21)], "steps that were repeated are logged once"


def interrupt(monkeypatch, arguments, step):
    """Trains until Ctrl-C arrives in the given step, the first being 0."""
    original = LanguageModel.training_step

    def stop(self, batch, batch_idx):
        if self.trainer.global_step == step:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "training_step", stop)
        assert train.main(arguments) == 130


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
            self.valid_metrics["valid"].nll += 1e6
        original(self)

    monkeypatch.setattr(LanguageModel, "on_validation_epoch_end", worse)
    interrupt(monkeypatch, arguments, step=12)
    assert train.main([*arguments, "resume=auto"]) == 0
    (run,) = run_dirs(tmp_path)
    assert read(named_checkpoint(run, "best"))["global_step"] == 10
    events = EventAccumulator(str(run)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("valid/loss")] == [10, 20]


def test_the_recipe_of_a_resumed_run_repeats_it(tmp_path, options, monkeypatch):
    interrupt(monkeypatch, [TINY, *options, "trainer.steps=12"], step=7)
    assert train.main([TINY, *options, "trainer.steps=12", "resume=auto"]) == 0
    (run,) = run_dirs(tmp_path)
    assert train.main([str(run / "recipe.yaml")]) == 0
    first, second = run_dirs(tmp_path)
    assert metric(first, "train/loss") == metric(second, "train/loss")


def test_a_run_that_another_process_trains_is_left_alone(tmp_path, options, monkeypatch, capsys):
    arguments = [TINY, *options, "trainer.steps=12"]
    interrupt(monkeypatch, arguments, step=7)
    (run,) = run_dirs(tmp_path)
    with lock_run(run):
        assert train.main([*arguments, f"resume={run}"]) == 2
        assert "another process is training that run" in capsys.readouterr().err
        assert train.main([*arguments, "resume=auto"]) == 0
    assert len(run_dirs(tmp_path)) == 2


def test_a_run_outlives_its_documents(tmp_path, options, capsys, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question\n" * 200)
    arguments = [TINY, *options, f"data.files={text}", "trainer.steps=2"]
    assert train.main(arguments) == 0
    text.unlink()
    assert generate.main([str(run_dirs(tmp_path)[0]), "--max-new-tokens", "3"]) == 0
    # Nor does an old run whose documents have gone stand in the way of another.
    assert train.main([TINY, *options, "trainer.steps=2", "resume=auto"]) == 0


def test_resuming_with_another_optimiser_is_refused(tmp_path, options, capsys):
    assert train.main([TINY, *options, "trainer.steps=2"]) == 0
    run = run_dirs(tmp_path)[0]
    assert train.main([TINY, *options, f"resume={run}", "trainer.steps=4", "optim.lr=1e-5"]) == 2
    assert "optim.lr was 0.01 and is now 1e-05" in capsys.readouterr().err


def test_auto_starts_anew_where_the_recipe_differs_or_the_run_is_finished(tmp_path, options, capsys):
    short = [*options, "trainer.steps=2"]
    assert train.main([TINY, *short]) == 0
    assert train.main([TINY, *short, "resume=auto"]) == 0
    assert "no unfinished run" in capsys.readouterr().out
    assert len(run_dirs(tmp_path)) == 2


def test_resuming_with_another_model_names_the_keys(tmp_path, options, capsys):
    assert train.main([TINY, *options, "trainer.steps=2"]) == 0
    run = run_dirs(tmp_path)[0]
    assert train.main([TINY, *options, f"resume={run}", "model.d_model=48"]) == 2
    assert "model.d_model was 32 and is now 48" in capsys.readouterr().err


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_continued(
    tmp_path, options, monkeypatch, caplog
):
    assert train.main([TINY, *options]) == 0
    arguments = [TINY, *options, "trainer.keep_checkpoints=1"]
    interrupt(monkeypatch, [*arguments, "trainer.keep_checkpoints=2"], step=17)
    whole, run = run_dirs(tmp_path)
    last = named_checkpoint(run, "last")
    (last / "state.ckpt").write_bytes((last / "state.ckpt").read_bytes()[:-1])
    (run / "recipe.yaml").write_text(
        (run / "recipe.yaml").read_text().replace("keep_checkpoints: 2", "keep_checkpoints: 1")
    )
    assert train.main([*arguments, "resume=auto"]) == 0
    assert "step-00000015 is damaged: state.ckpt has" in caplog.text
    assert run_dirs(tmp_path) == [whole, run]
    assert metric(run, "train/loss") == metric(whole, "train/loss")
    assert list_checkpoints(run) == [run / "checkpoints" / "step-00000020"]


def test_a_checkpoint_of_another_model_is_refused_by_its_keys(
    finished, tmp_path, options, monkeypatch, capsys
):
    wide = [TINY, *options, "model.d_model=48"]
    interrupt(monkeypatch, wide, step=7)
    (run,) = run_dirs(tmp_path)
    shutil.copytree(finished[0] / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000020")
    for tool, arguments in ((train, [*wide, "resume=auto"]), (generate, [str(run)])):
        assert tool.main(arguments) == 2
        said = "step-00000020 is of another recipe: model.d_model is 32 there and 48 in the recipe"
        assert said in capsys.readouterr().err


def test_a_run_that_was_killed_just_before_its_result_gets_it(tmp_path, options, capsys):
    assert train.main([TINY, *options]) == 0
    (run,) = run_dirs(tmp_path)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    assert train.main([TINY, *options, "resume=auto"]) == 0
    assert json.loads((run / "result.json").read_text()) == pytest.approx(result)
    assert "after 20 steps" in capsys.readouterr().out
    assert run_dirs(tmp_path) == [run]


def test_resuming_a_run_that_is_at_its_end_says_so(tmp_path, options, capsys):
    assert train.main([TINY, *options, "trainer.steps=2"]) == 0
    run = run_dirs(tmp_path)[0]
    assert train.main([TINY, *options, f"resume={run}", "trainer.steps=2"]) == 2
    assert "that run has done 2 steps, and this recipe ends after 2" in capsys.readouterr().err
    assert (run / "result.json").exists()


def test_resuming_with_other_documents_is_refused(tmp_path, options, capsys):
    text = tmp_path / "text.txt"
    bpe = [f"data.files=[{text}]"]
    text.write_text("to be or not to be, that is the question\n" * 200)
    assert train.main([TINY, *options, *bpe, "trainer.steps=2"]) == 0
    run = run_dirs(tmp_path)[0]
    text.write_text("whether it is nobler in the mind to suffer\n" * 200)
    assert train.main([TINY, *options, *bpe, f"resume={run}", "trainer.steps=4"]) == 2
    assert "the documents must have changed since" in capsys.readouterr().err


def test_a_finished_run_goes_on_to_more_steps(tmp_path, options, capsys):
    assert train.main([TINY, *options, "trainer.steps=4"]) == 0
    run = run_dirs(tmp_path)[0]
    assert train.main([TINY, *options, f"resume={run}", "trainer.steps=6"]) == 0
    assert "trainer.steps: was 4, now 6" in capsys.readouterr().out
    assert sorted(metric(run, "train/loss")) == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    tmp_path, options, monkeypatch, capsys
):
    step = LanguageModel.training_step

    def poisoned(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == 7 else loss

    monkeypatch.setattr(LanguageModel, "training_step", poisoned)
    assert train.main([TINY, *options]) == 1
    error = capsys.readouterr().err
    assert "step 8" in error
    assert "lower optim.lr" in error
    run = run_dirs(tmp_path)[0]
    state = read(named_checkpoint(run, "last"))
    assert state["global_step"] == 7
    assert all(torch.isfinite(value).all() for value in state["state_dict"].values())
    assert not (run / "result.json").exists()


@pytest.fixture
def packed(tmp_path):
    """Overrides for rows with documents packed into them, which have different numbers of labels."""
    documents = tmp_path / "documents.jsonl"
    text = (ROOT / "tests" / "golden" / "text.txt").read_text().split()
    pieces = [" ".join(text[i : i + 1 + i % 23]) for i in range(0, len(text), 12)]
    documents.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return [f"data.files=[{documents}]", "data.column=text", "data.pack=true"]


def first_batch(recipe):
    data = make_data(recipe)
    data.prepare()
    rows = data.train_dataset()
    indices = Batches(recipe.seed, len(rows), recipe.trainer.batch_size).batch(0)
    return default_collate([rows[i] for i in indices]), data.vocab_size


def test_training_keeps_packed_documents_apart(options, packed):
    recipe = load_recipe(TINY, [*options, *packed])
    batch, vocab_size = first_batch(recipe)
    module = LanguageModel(recipe, make_decoder(recipe, vocab_size).double(), total_steps=1)
    together = module.training_step(batch, 0)
    apart = torch.zeros(())
    for ids, labels, segments in zip(
        *(batch[key] for key in ("input_ids", "labels", "segment_ids")), strict=True
    ):
        for segment in segments.unique():
            here = segments == segment
            apart = apart + module.decoder(ids[None, here], labels[None, here])[0].sum()
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=0, check_dtype=False)


def test_the_first_step_has_the_gradient_of_the_mean_over_all_labels(tmp_path, options, packed):
    changed = [*options, *packed, "trainer.steps=1", "trainer.batch_size=8"]
    recipe = load_recipe(TINY, changed)
    batch, vocab_size = first_batch(recipe)
    decoder = make_decoder(recipe, vocab_size)
    nll, _ = decoder(batch["input_ids"], batch["labels"], batch["segment_ids"])
    (nll.sum() / (batch["labels"] >= 0).sum()).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in decoder.parameters() if p.grad is not None])
    for layout in (["trainer.batch_size=8"], ["trainer.batch_size=2", "trainer.accumulate=4"]):
        assert train.main([TINY, *changed, *layout]) == 0
        assert metric(run_dirs(tmp_path)[-1], "train/gradient_norm")[1] == pytest.approx(
            float(norm), rel=1e-5
        )


def test_accumulated_micro_batches_give_the_step_of_one_batch(tmp_path, options, packed):
    extra = [*packed, "optim.grad_clip=0.5"]
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        sizes = [f"trainer.batch_size={batch_size}", f"trainer.accumulate={accumulate}"]
        assert train.main([TINY, *options, *extra, *sizes]) == 0
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
        assert train.main([TINY, *options, *changed, *sizes]) == 0
        norms.append(metric(run_dirs(tmp_path)[-1], "train/gradient_norm"))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2][1] != pytest.approx(norms[0][1], rel=0.01), "the penalty has a part in it"


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_learns_and_keeps_gains_in_float32(tmp_path, options, precision):
    assert train.main([TINY, *options, f"trainer.precision={precision}"]) == 0
    run = run_dirs(tmp_path)[0]
    exact = json.loads(CURVE.read_text())["20"]
    assert metric(run, "train/loss")[20] == pytest.approx(exact, abs=0.15)
    weights = read(named_checkpoint(run, "last"))["state_dict"]
    low = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert weights["decoder.blocks.0.mixer.proj_fb.weight"].dtype == low
    assert weights["decoder.blocks.0.mixer.gamma_bias"].dtype == torch.float32
    assert generate.main([str(run), "--max-new-tokens", "4"]) == 0


@pytest.mark.slow
def test_compiled_blocks_give_the_same_curve(tmp_path, options):
    assert train.main([TINY, *options, "strategy.compile=true"]) == 0
    committed = {int(step): loss for step, loss in json.loads(CURVE.read_text()).items()}
    assert metric(run_dirs(tmp_path)[0], "train/loss") == pytest.approx(committed, abs=1e-3)


@pytest.mark.parametrize("block", ["gated", "transformer"])
@pytest.mark.parametrize(
    "mixer", ["identity", "attention", "sessa", "[attention, {name: sessa, n_feedback_heads: 2}]"]
)
def test_any_mixer_trains_in_any_block(tmp_path, options, mixer, block):
    changed = [f"model.mixer={mixer}", f"model.block={block}", "model.norm=rmsnorm", "trainer.steps=8"]
    assert train.main([TINY, *options, *changed]) == 0
    losses = metric(run_dirs(tmp_path)[0], "train/loss")
    assert losses[8] < losses[1] - 0.5


@pytest.mark.parametrize(
    ("horizon", "steps"), [("steps=7", 7), ("epochs=1.5", 15), ("epochs=0.01", 1), ("tokens=1e4", 20)]
)
def test_the_horizon_in_steps(horizon, steps):
    recipe = load_recipe(TINY, [f"trainer.{horizon}", "trainer.accumulate=2"])  # 8 rows of 64 tokens per step
    assert count_steps(recipe, n_rows=80, seq_len=64) == steps


RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_on_the_meta_device(path):
    recipe = load_recipe(path)
    with torch.device("meta"):
        decoder = build_decoder(recipe, make_data(recipe).vocab_size)
    assert all(parameter.is_meta for parameter in decoder.parameters())


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_dry_runs_at_reduced_size(path, capsys, tmp_path):
    reduced = ["model.d_model=64", "model.n_layers=2", "data.seq_len=32", "data.vocab_size=300"]
    reduced += ["trainer.batch_size=2"]
    assert train.main([str(path), "--dry-run", *reduced, f"logging.dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    for wanted in ("embedding", "mixer", "MLP", "head", "FLOPs per token", "memory", "outputs would go to"):
        assert wanted in printed
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"
