"""Accuracy by difficulty in TensorBoard."""

from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mixerlab.lm.training.difficulty_plot import DifficultyPlot, difficulties
from mixerlab.lm.training.loggers import TensorBoard
from one_step import fake_trainer
from tiny_runs import places, run_dirs, train


def test_datasets_are_grouped_by_what_they_differ_in_and_sorted_by_number():
    names = ["valid", "lag_1024", "lag_512", "pairs_8", "a_b_2", "a_b_10", "test"]
    assert difficulties(names) == {
        "lag": {512: "lag_512", 1024: "lag_1024"},
        "a_b": {2: "a_b_2", 10: "a_b_10"},
    }


def pictures(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {tag: [picture.step for picture in events.Images(tag)] for tag in events.Tags()["images"]}


def test_a_run_has_a_picture_at_every_validation(tmp_path, at_the_root):
    task = ["data=mqar", "data.seq_len=32", "data.n_pairs=2", "data.test_pairs=[4, 8]", "data.vocab_size=64"]
    rows = ["data.n_train=64", "data.n_valid=8", "trainer.steps=4", "trainer.val_every=2"]
    model = ["model.mixer=attention", "model.d_model=8", "model.n_layers=1"]
    assert train("quickstart", *task, *rows, *model, *places(tmp_path)) == 0
    assert pictures(run_dirs(tmp_path, "quickstart")[0]) == {"accuracy by pairs": [2, 4]}


@pytest.mark.parametrize("names", [["valid"], ["valid", "lag_8"]], ids=str)
def test_without_difficulties_there_is_no_picture(tmp_path, names):
    trainer = fake_trainer(step=3)
    trainer.loggers = [TensorBoard(tmp_path, 0)]
    rates = {f"{name}/accuracy": 0.5 for name in names}
    DifficultyPlot(names).on_validation_end(trainer, SimpleNamespace(valid_rates=rates))
    trainer.loggers[0].save()
    assert pictures(tmp_path) == {}
