"""The tiny recipe, runs of it, and what they leave behind, for the tests that train."""

import csv
import json
from pathlib import Path

import mixerlab.lm.training.module as training_module
from mixerlab.__main__ import main
from mixerlab.lm.run.folder import Run

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
TINY = "tests/golden/tiny.yaml"


def golden_curve():
    """step -> training loss of the tiny recipe, as committed."""
    return {int(step): loss for step, loss in json.loads((GOLDEN / "tiny.json").read_text()).items()}


def places(folder):
    """Overrides with which a run writes under `folder` alone."""
    return [f"logging.dir={folder / 'runs'}", f"data.cache_dir={folder / 'cache'}"]


def packed_documents(folder):
    """Overrides for rows with documents packed into them, which have different numbers of labels."""
    documents = folder / "documents.jsonl"
    text = (GOLDEN / "text.txt").read_text().split()
    pieces = [" ".join(text[i : i + 1 + i % 23]) for i in range(0, len(text), 12)]
    documents.write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    return [f"data.files=[{documents}]", "data.column=text", "data.pack=true"]


def train(*arguments):
    """Trains in this process; returns the exit code."""
    return main(["train", *map(str, arguments)])


def generate(*arguments):
    """Generates text in this process; returns the exit code."""
    return main(["generate", *map(str, arguments)])


def interrupt(monkeypatch, arguments, step):
    """Trains until Ctrl-C arrives in the given step, the first being 0."""
    before_step(monkeypatch, step, _press_ctrl_c, lambda: train(*arguments), code=130)


def _press_ctrl_c(module):
    raise KeyboardInterrupt


def before_step(monkeypatch, step, happens, training, code=0):
    """Runs `training`, in which `happens(module)` before the given step, the first being 0."""
    original = training_module.LanguageModel.training_step

    def training_step(self, micro_batches, batch_idx):
        if self.trainer.global_step == step:
            happens(self)
        return original(self, micro_batches, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(training_module.LanguageModel, "training_step", training_step)
        assert training() == code


def run_dirs(folder, name="tiny"):
    """The run folders under `folder`, oldest first."""
    return sorted((folder / "runs" / name).iterdir(), key=lambda path: Run(path).order)


def metric(run, name):
    """step -> value of a metric."""
    with (run / "metrics.csv").open() as file:
        return {
            int(row["step"]): float(row["value"]) for row in csv.DictReader(file) if row["metric"] == name
        }
