"""mixerlab evaluate: scores in the run folder, in TensorBoard and in reports; processes that share; every refusal."""

import json
import math
import subprocess
import sys

import pytest
import torch
import yaml
from lm_eval.tasks import TaskManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from local_tasks import TASKS, documents, prose, write_tasks
from mixerlab.__main__ import main
from mixerlab.lm.evaluation.evaluate import evaluate, find_tasks, matching
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.scores import add_scores, scores_of
from mixerlab.lm.sweep.table import tabulate
from mixerlab.lm.training.validation import validate_run
from mixerlab.options import ConfigError
from sweeps import made_up
from tiny_runs import ROOT
from untrained_runs import ATTENTION, STEP, untrained

MODEL = {"mlp": "gelu", "mixer": ATTENTION}


@pytest.fixture
def tasks(tmp_path):
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def run(tmp_path):
    return untrained(tmp_path / "run", MODEL, "bpe")


def run_command(run, tasks, *arguments):
    return main(["evaluate", str(run.path), "--include-path", str(tasks), "--device", "cpu", *arguments])


def noted(run, step=STEP):
    return json.loads((run.path / "evaluation" / f"step-{step:08}.json").read_text())


def test_scores_go_to_the_run_folder_to_tensorboard_and_to_the_terminal(run, tasks, capsys):
    assert run_command(run, tasks, "--tasks", "which,prose") == 0
    printed = capsys.readouterr().out
    found = noted(run)
    assert list(found) == ["which", "prose"]
    assert found["which"]["scores"].keys() == {"acc", "acc_norm", "brier_score"}
    assert found["which"]["errors"].keys() == {"acc", "acc_norm"}
    assert found["which"]["higher_is_better"] == {"acc": True, "acc_norm": True, "brier_score": False}
    assert (found["which"]["documents"], found["prose"]["documents"], found["prose"]["version"]) == (12, 6, 2)
    assert found["prose"]["max_length"] == 64
    board = EventAccumulator(str(run.path / "evaluation")).Reload()
    for name, score in scores_of(run).items():
        (event,) = board.Scalars(name)
        assert event.step == STEP
        assert event.value == pytest.approx(score.value)
        _, task, metric = name.split("/")
        assert f"{found[task]['scores'][metric]:.4f}" in printed
        (line,) = [line.split() for line in printed.splitlines() if line.split()[:2] == [task, metric]]
        assert line[2] == f"{score.value:.4f}"
        assert ("higher" if score.higher_is_better else "lower") in line
    assert board.Tags()["scalars"] == list(scores_of(run))
    assert printed.rstrip().endswith(f"step {STEP}: {run.path / 'evaluation' / f'step-{STEP:08}.json'}")
    assert not list(run.path.glob("events.out.*")), "TensorBoard would stop following the run's own"


def test_scores_of_other_tasks_stay_and_those_of_the_same_are_replaced(run, tasks):
    first = evaluate(run, ["which"], include_path=tasks)
    second = evaluate(run, ["finish"], include_path=tasks, batch_size=1)
    assert first is not None
    assert second is not None
    assert noted(run) == first.tasks | second.tasks
    add_scores(run, STEP, {"which": {"scores": {"acc": 2.0}, "higher_is_better": {}}})
    assert scores_of(run)["eval/which/acc"].value == 2.0
    assert "eval/finish/chrf" in scores_of(run)
    assert "eval/which/brier_score" not in scores_of(run)


def test_a_few_documents_and_examples_make_another_task(run, tasks, capsys):
    few = ("--tasks", "which", "--limit", "5")
    assert run_command(run, tasks, *few, "--num-fewshot", "2", "--max-length", "20") == 0
    assert "15 of 15 texts had more than 20 tokens and lost their beginning" in capsys.readouterr().out
    assert run_command(run, tasks, *few) == 0
    found = noted(run)
    assert list(found) == ["which-2shot-first5", "which-first5"]
    assert [task["documents"] for task in found.values()] == [5, 5]
    assert [task["num_fewshot"] for task in found.values()] == [2, 0]
    scores = [task["scores"]["brier_score"] for task in found.values()]
    assert scores[0] != scores[1]
    assert "lost their beginning" not in capsys.readouterr().out


def test_a_pattern_stands_for_every_name_that_fits():
    names = ["mmlu", "mmlu_law", "mmlu_sport", "wikitext"]
    assert matching("mmlu_*", names) == ["mmlu_law", "mmlu_sport"]
    assert matching("mmlu", names) == ["mmlu"]


def test_groups_have_a_score_and_so_have_their_tasks(run, tasks):
    group = {
        "group": "both",
        "task": ["which", "again"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
    }
    again = yaml.safe_load(TASKS["which"].replace("FOLDER", str(tasks))) | {"task": "again"}
    (tasks / "both.yaml").write_text(yaml.safe_dump(group))
    (tasks / "again.yaml").write_text(yaml.safe_dump(again))
    found = evaluate(run, ["both"], include_path=tasks)
    assert found is not None
    assert found.metrics["eval/both/acc"] == pytest.approx(found.metrics["eval/which/acc"])
    assert set(found.tasks) == {"both", "which", "again"}


def nll(decoder, ids, target):
    """Nats of a token after others."""
    return -float(decoder(torch.tensor([ids]))[0, -1].double().log_softmax(-1)[target])


@torch.no_grad()
def test_bits_per_byte_are_those_of_validation_but_for_the_ends_of_documents(tmp_path, tasks):
    T = 64
    texts = [prose()[-1].encode()[i * T : (i + 1) * T - (i > 0)].decode() for i in range(5)]
    assert [len(text.encode()) for text in texts] == [T] + [T - 1] * 4  # so that each has a row of its own
    for name, some in {"train": texts * 2, "valid": texts}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in some))
    data = {
        "name": "text",
        "source": "files",
        "tokenizer": "bytes",
        "column": "text",
        "pack": False,
        "seq_len": T,
    }
    data |= {"files": [str(tmp_path / "train.jsonl")], "valid_files": [str(tmp_path / "valid.jsonl")]}
    run = untrained(tmp_path / "run", MODEL, data=data | {"cache_dir": str(tmp_path / "cache")})
    ((_, rates),) = validate_run(run)
    # Validation reads what is left of the first document alone, and of each also its end, but not its first token.
    whole = texts[1:]
    (tasks / "prose.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in whole))
    found = evaluate(run, ["prose"], include_path=tasks)
    assert found is not None
    nats = found.metrics["eval/prose/bits_per_byte"] * math.log(2) * (T - 1) * 4
    decoder = run.decoder()
    for text in whole:
        ids = list(text.encode())
        nats += nll(decoder, [256, *ids], 256) - nll(decoder, [256], ids[0])
    first = [*texts[0].encode(), 256]
    nats += sum(nll(decoder, first[:n], first[n]) for n in range(1, T + 1))
    text_bytes = T - 1 + 4 * (T - 2)
    assert rates["bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-6)


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, tasks, capfd):
    arguments = ("--tasks", ",".join(TASKS), "--batch-size", "3")
    assert run_command(run, tasks, *arguments) == 0
    one = noted(run)
    (run.path / "evaluation" / f"step-{STEP:08}.json").unlink()
    command = ("-m", "mixerlab", "evaluate", str(run.path), "--include-path", str(tasks), *arguments)
    for start in (
        (sys.executable, *command, "--device", "cpu", "--devices", "2"),
        (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *command, "--device", "cpu"),
    ):
        done = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("brier_score") == 1, "one of them speaks"
        two = noted(run)
        for task, found in two.items():
            assert found["scores"] == pytest.approx(one[task]["scores"], rel=1e-6), task
            assert {**found, "scores": {}} == {**one[task], "scores": {}} | {"errors": found["errors"]}
        assert two.keys() == one.keys()


@pytest.mark.slow
def test_of_two_processes_one_says_what_is_wrong(run, tasks):
    for arguments in (["--checkpoint", "77"], ["--max-length", "7"]):
        command = (
            "-m",
            "mixerlab",
            "evaluate",
            str(run.path),
            "--include-path",
            str(tasks),
            "--tasks",
            "finish",
        )
        done = subprocess.run(
            (sys.executable, *command, *arguments, "--device", "cpu", "--devices", "2"),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 2
        errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
        assert len(errors) == 1
        assert "Traceback" not in done.stderr


def refusal(run, tasks, capsys, *arguments):
    """The one line that the command ends with."""
    capsys.readouterr()
    assert run_command(run, tasks, *arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    return lines[0].removeprefix("error: ")


def test_an_unknown_task_is_refused_with_names_that_are_near(run, tasks, capsys, monkeypatch):
    monkeypatch.setattr(
        "mixerlab.lm.evaluation.evaluate.TaskManager",
        lambda include_path, include_defaults=True: TaskManager(
            include_path=include_path, include_defaults=False
        ),
    )  # the harness' own take seconds to list
    said = refusal(run, tasks, capsys, "--tasks", "prose,whichh")
    assert said.startswith("--tasks whichh: no such task; did you mean which? ")
    assert refusal(run, tasks, capsys, "--tasks", "zzz*").startswith(
        "--tasks zzz*: no such task; `lm_eval ls"
    )


def test_the_harness_knows_its_own_tasks_too(tasks):
    with pytest.raises(ConfigError, match="did you mean hellaswag"):
        find_tasks(["which", "hellaswga"], tasks)


def test_wrong_folders_are_refused(run, tasks, capsys):
    assert "nowhere: no such folder; expected a folder with tasks" in refusal(
        run, "nowhere", capsys, "--tasks", "a"
    )
    assert "which.yaml: that is a file" in refusal(run, tasks / "which.yaml", capsys, "--tasks", "a")
    empty = tasks.parent / "empty"
    empty.mkdir()
    assert "empty: no tasks in it; expected YAML files that say `task:`" in refusal(
        run, empty, capsys, "--tasks", "a"
    )
    assert not (run.path / "evaluation").exists()


def test_a_task_that_cannot_be_loaded_is_refused_with_the_reason(run, tasks, capsys):
    (tasks / "which.jsonl").unlink()
    said = refusal(run, tasks, capsys, "--tasks", "which")
    assert said.startswith("--tasks which: they cannot be loaded: FileNotFoundError: ")
    assert "which.jsonl" in said


def test_a_task_that_runs_code_of_the_model_is_refused(run, tasks, capsys):
    (tasks / "which.yaml").write_text((tasks / "which.yaml").read_text() + "unsafe_code: true\n")
    said = refusal(run, tasks, capsys, "--tasks", "which")
    assert said == "--tasks which: it runs code that the model writes; expected a task of text alone"


def test_more_examples_than_there_are_are_refused(run, tasks, capsys):
    said = refusal(run, tasks, capsys, "--tasks", "which", "--num-fewshot", "20")
    assert said == "--num-fewshot 20: a task has fewer examples to show"


def test_texts_that_do_not_fit_are_refused(run, tasks, capsys):
    assert "--max-length 20: task finish generates up to 20 tokens" in refusal(
        run, tasks, capsys, "--tasks", "finish", "--max-length", "20"
    )
    assert "--max-length 3: a continuation to be scored has" in refusal(
        run, tasks, capsys, "--tasks", "which", "--max-length", "3"
    )


def test_runs_that_are_not_there_or_have_no_text_are_refused(run, tasks, tmp_path, capsys):
    assert "nowhere: no such folder" in refusal(Run(tmp_path / "nowhere"), tasks, capsys, "--tasks", "which")
    symbols = untrained(tmp_path / "symbols", MODEL, tokenizer=None)
    said = refusal(symbols, tasks, capsys, "--tasks", "which")
    assert said == f"run folder {symbols.path}: it has no tokenizer, so its tokens are not text"
    assert "checkpoint '77' of" in refusal(run, tasks, capsys, "--tasks", "which", "--checkpoint", "77")
    more = untrained(tmp_path / "more", MODEL, "bpe", rows=270)
    assert "tokens, and its decoder 270; they are of different runs" in refusal(
        more, tasks, capsys, "--tasks", "which"
    )


def test_without_the_extra_it_is_named(run, tasks, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    said = refusal(run, tasks, capsys, "--tasks", "which")
    assert said.endswith("expected it installed: pip install 'mixerlab[eval]'")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "which,"], "expected names with commas"),
        (["--tasks", "which", "--limit", "0"], "expected at least 1"),
        (["--tasks", "which", "--devices", "many"], "invalid"),
        ([], "--tasks"),
    ],
)
def test_wrong_arguments_are_refused(run, tasks, arguments, said, capsys):
    with pytest.raises(SystemExit):
        run_command(run, tasks, *arguments)
    assert said in capsys.readouterr().err


def evaluated(folder, scores, **more):
    """A sweep of two mixers and two learning rates, whose runs have these scores on a task."""
    settings = [
        (
            {"model.mixer": mixer, "seed": str(seed), "optim.lr": lr},
            {"valid__loss": 3.0 - (lr == "1e-3"), "valid__bits_per_byte": 2.0 - (lr == "1e-3")},
        )
        for mixer in ("a", "b")
        for lr in ("1e-3", "1e-2")
        for seed in (0, 1)
    ]
    sweep = made_up(folder, settings)
    for (label, point), score in zip(sweep.points.items(), scores, strict=True):
        run = sweep.run_of(label)
        assert run is not None
        entry = {"scores": {"acc": score, "ter": score}, "higher_is_better": {"acc": True, "ter": False}}
        add_scores(run, 3, {"which": entry | {"scores": {"acc": -1.0}}})  # an earlier checkpoint
        add_scores(run, 6, {"which": entry})
        assert point.values
    return sweep


def test_a_report_shows_a_score_and_knows_which_way_is_better(tmp_path, capsys):
    sweep = evaluated(tmp_path, [0.1, 0.2, 0.9, 0.9, 0.3, 0.4, 0.8, 0.8])
    table = tabulate([sweep], "eval/which/acc")
    assert [(row.name, round(row.mean("eval/which/acc"), 3)) for row in table.rows] == [
        ("b", 0.35),
        ("a", 0.15),
    ]
    assert [row.tuned for row in table.rows] == [{"optim.lr": "1e-3"}] * 2, "chosen on validation alone"
    assert table.selection == "valid/bits_per_byte"
    assert [row.name for row in tabulate([sweep], "eval/which/ter").rows] == ["a", "b"]
    assert main(["report", str(sweep.path), "--metric", "eval/which/acc"]) == 0
    assert "eval which acc" in capsys.readouterr().out
    assert "0.350" in (sweep.path / "report" / "report.md").read_text()
    assert "eval/which/ter" in (sweep.path / "report" / "runs.csv").read_text()
    assert tabulate([sweep]).metric == "valid/bits_per_byte"


@pytest.mark.parametrize(
    "text",
    ["[]", "{", '{"which": 3}', '{"which": {"scores": {"acc": "x"}, "higher_is_better": {}}}', "\udc80"],
)
def test_damaged_scores_are_said_in_one_line(run, text):
    (run.path / "evaluation").mkdir()
    (run.path / "evaluation" / "step-00000003.json").write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError) as refused:
        scores_of(run)
    assert "step-00000003.json" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_document_of_the_local_tasks_is_used(tasks):
    found = {task.task_name: len(task.eval_docs) for task in find_tasks([*TASKS], tasks)}
    assert found == {name: len(some) for name, some in documents().items()}
