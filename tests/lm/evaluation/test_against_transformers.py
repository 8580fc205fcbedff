"""A run and the folder of transformers that it is exported to have the same scores, in the harness' own model of it."""

import sys
import types

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from local_tasks import TASKS, sentence, write_tasks
from mixerlab import train
from mixerlab.__main__ import main
from mixerlab.lm.evaluation.evaluate import evaluate
from untrained_runs import ATTENTION

CASES: dict[str, tuple[dict, str, int]] = {
    "llama, bytes": ({"block": "transformer", "norm": "rmsnorm", "mixer": ATTENTION}, "bytes", 4),
    "hybrid, bpe": (
        {"mixer": [{"name": "sessa", "n_heads": 2}, {"name": "mamba2", "head_dim": 8}]},
        "bpe",
        1,
    ),
}
"""Model, tokenizer, and texts at a time in transformers: code that imports mixerlab takes no padding on the left."""


@pytest.fixture
def their_model(monkeypatch):
    """The harness' model of a folder of transformers. It imports `accelerate`, which a loaded model does not need."""
    stand_in = types.ModuleType("accelerate")
    names = ("Accelerator", "InitProcessGroupKwargs", "find_executable_batch_size", "get_max_memory")
    stand_in.__dict__.update(dict.fromkeys(names))
    monkeypatch.setitem(sys.modules, "accelerate", stand_in)
    monkeypatch.setitem(sys.modules, "accelerate.utils", stand_in)
    from lm_eval.models.huggingface import HFLM

    def make(folder, **options):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        return HFLM(model.eval(), tokenizer=tokenizer, **options)

    return make


def trained(folder, model, tokenizer):
    """A run that has learned a little of the tasks' sentences, but not all of it."""
    file = folder / "text.txt"
    file.write_text("".join(sentence(i) + "\n" * (i % 5 == 0) for i in range(600)))
    data = {"source": "files", "files": [str(file)], "tokenizer": tokenizer, "vocab_size": 300, "seq_len": 64}
    return train(
        "tests/golden/tiny.yaml",
        console=Console(quiet=True),
        model={"d_model": 32, "n_layers": 2, **model},
        data={**data, "cache_dir": str(folder / "cache")},
        trainer={"steps": 100},
        logging={"dir": str(folder / "runs")},
    )


@pytest.mark.slow
@pytest.mark.parametrize(("model", "tokenizer", "batch_size"), CASES.values(), ids=CASES)
def test_the_exported_folder_has_the_same_scores(
    model, tokenizer, batch_size, tmp_path, at_the_root, their_model
):
    run = trained(tmp_path, model, tokenizer)
    folder = write_tasks(tmp_path / "tasks")
    ours = evaluate(run, [*TASKS], include_path=folder, batch_size=5)
    assert ours is not None
    assert main(["export", str(run.path), "--to", str(tmp_path / "exported")]) == 0
    theirs = simple_evaluate(
        their_model(tmp_path / "exported", batch_size=batch_size),
        tasks=[*TASKS],
        task_manager=TaskManager(include_path=folder, include_defaults=False),
        bootstrap_iters=0,
    )
    expected = {
        f"eval/{task}/{name.removesuffix(',none')}": value
        for task, values in theirs["results"].items()
        for name, value in values.items()
        if name.endswith(",none") and "_stderr" not in name
    }
    assert ours.metrics == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len(expected) == 7
    assert 0 < ours.metrics["eval/which/acc"] < 1
    assert 5 < ours.metrics["eval/finish/chrf"] < 95
