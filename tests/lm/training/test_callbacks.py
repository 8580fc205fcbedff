"""What happens between steps: when checkpoints are written, metrics logged and validations made up for."""

import math
import threading
from types import SimpleNamespace

import pytest
import torch

from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import TrainerConfig
from mixerlab.lm.run.checkpoint import CheckpointError, read, read_meta, step_of
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.callbacks import (
    Checkpoints,
    Metrics,
    PendingValidation,
    SignsOfLife,
    StopAtTheEnd,
)
from one_step import fake_trainer


class Rig:
    """The callback in the hands of a trainer that takes steps and validates as Lightning does."""

    def __init__(self, folder, steps=20, first=0, **config):
        self.run = Run(folder)
        self.config = TrainerConfig(steps=steps, **config)
        self.world = World()
        self.callback = Checkpoints(self.run, self.config, self.world)
        self.written = []
        self.weights = torch.zeros(3)
        self.module = SimpleNamespace(valid_loss=None, valid_rates={})
        self.trainer = fake_trainer(first, steps, save_checkpoint=self.save)
        self.trainer.strategy = self
        self.callback.setup(self.trainer, self.module, "fit")

    optimizers = ()

    def lightning_module_state_dict(self):
        return {"a": self.weights}

    def save(self, folder, storage_options):
        step = self.trainer.global_step
        assert folder == self.run.checkpoints.at(step)
        self.written.append(step)
        state = {"global_step": step, "state_dict": {"a": self.weights}}
        notes = {"valid_loss": self.module.valid_loss, "metrics": self.module.valid_rates or None}
        storage_options.save({**state, **notes}, folder)

    def train(self, until, losses=()):
        """Goes on to a step; `losses` are those of the validations, None where a loss is not finite."""
        losses = dict(losses)
        while self.trainer.global_step < until:
            self.trainer.global_step += 1
            self.module.valid_loss, self.module.valid_rates = None, {}
            self.callback.on_train_batch_end(self.trainer, self.module, None, None, 0)
            step = self.trainer.global_step
            if step % self.config.val_every == 0 or step == self.trainer.max_steps:
                self.validate(losses[step])
        self.callback.wait()

    def validate(self, loss):
        self.module.valid_loss, self.module.valid_rates = (
            loss,
            {"valid/loss": math.nan if loss is None else loss},
        )
        self.callback.on_validation_end(self.trainer, self.module)

    @property
    def kept(self):
        return [step_of(folder) for folder in self.run.checkpoints.all()]


def test_checkpoints_are_written_every_so_many_steps_and_at_the_last(tmp_path):
    rig = Rig(tmp_path, steps=10, checkpoint_every=4, val_every=100)
    rig.train(10, {10: 2.0})
    assert rig.written == [4, 8, 10]


def test_of_a_step_that_is_validated_the_checkpoint_waits_for_the_validation(tmp_path):
    rig = Rig(tmp_path, steps=10, checkpoint_every=5, val_every=5)
    rig.trainer.global_step = 5
    rig.callback.on_train_batch_end(rig.trainer, rig.module, None, None, 0)
    assert rig.written == []
    rig.validate(2.0)
    rig.callback.wait()
    assert rig.written == [5]
    meta = read_meta(rig.run.checkpoints.at(5))
    assert (meta["valid_loss"], meta["metrics"]) == (2.0, {"valid/loss": 2.0})


def test_the_best_validation_has_a_checkpoint_wherever_it_falls(tmp_path):
    rig = Rig(tmp_path, steps=20, checkpoint_every=100, val_every=3)
    rig.train(20, {3: 5.0, 6: 6.0, 9: 4.0, 12: 4.0, 15: None, 18: 3.0, 20: 9.0})
    assert rig.written == [3, 9, 18, 20], (
        "the equally good is no better, and a loss that is not finite never is"
    )


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    rig = Rig(tmp_path, steps=30, checkpoint_every=3, val_every=6, keep_checkpoints=2)
    losses = {6: 4.0, 12: 2.0, 18: 3.0, 24: 3.5, 30: 3.0}
    for step, kept in ((6, [3, 6]), (12, [9, 12]), (15, [12, 15]), (18, [12, 15, 18]), (30, [12, 27, 30])):
        rig.train(step, losses)
        assert rig.kept == kept
    assert rig.run.checkpoints.best() == rig.run.checkpoints.at(12)


def test_a_continued_run_knows_its_best_and_does_not_write_where_it_began(tmp_path):
    Rig(tmp_path, steps=20, checkpoint_every=5, val_every=5).train(10, {5: 2.0, 10: 3.0})
    rig = Rig(tmp_path, steps=20, first=10, checkpoint_every=5, val_every=5)
    rig.callback.save(rig.trainer)  # asked to end before the first step
    assert rig.written == []
    rig.train(20, {15: 2.5, 20: 9.0})
    assert rig.callback.best == 2.0
    assert rig.run.checkpoints.best() == rig.run.checkpoints.at(5)
    assert rig.written == [15, 20]


def test_a_validation_that_is_made_up_for_is_noted_in_the_checkpoint_that_the_run_goes_on_from(tmp_path):
    rig = Rig(tmp_path, checkpoint_every=5, val_every=100)
    rig.train(10)
    assert read_meta(rig.run.checkpoints.at(10))["metrics"] is None
    file = rig.run.checkpoints.at(10) / "state.ckpt"
    before = file.stat()
    rig = Rig(tmp_path, first=10, checkpoint_every=5, val_every=10)
    rig.validate(2.0)
    assert rig.written == []
    assert file.stat().st_ino == before.st_ino
    assert read_meta(rig.run.checkpoints.at(10))["metrics"] == {"valid/loss": 2.0}
    assert rig.run.checkpoints.best() == rig.run.checkpoints.at(10)


def test_the_watch_hears_of_a_checkpoint_before_it_is_written(tmp_path):
    rig = Rig(tmp_path, checkpoint_every=5, val_every=100)
    heard = []
    rig.trainer.save_checkpoint = lambda *args, **kwargs: heard.append(rig.world.doing)
    rig.train(5)
    assert heard == ["writing the checkpoint of step 5"]


def test_the_last_step_is_saved_before_its_validation_which_is_noted_after(tmp_path):
    rig = Rig(tmp_path, steps=10, checkpoint_every=100, val_every=5)
    rig.train(9, {5: 3.0})
    rig.trainer.global_step = 10
    rig.callback.on_train_batch_end(rig.trainer, rig.module, None, None, 0)
    rig.callback.wait()
    assert rig.written == [5, 10]
    assert read_meta(rig.run.checkpoints.at(10))["metrics"] is None
    rig.validate(2.0)
    assert rig.written == [5, 10]
    assert read_meta(rig.run.checkpoints.at(10))["metrics"] == {"valid/loss": 2.0}
    assert rig.run.checkpoints.best() == rig.run.checkpoints.at(10)


@pytest.fixture
def held(monkeypatch):
    """An event that the writing of checkpoints waits for."""
    event, write = threading.Event(), torch.save

    def when_released(*args):
        assert event.wait(60)
        write(*args)

    monkeypatch.setattr(torch, "save", when_released)
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, held):
    rig = Rig(tmp_path, checkpoint_every=5, val_every=100)
    rig.weights.fill_(1.0)
    rig.trainer.global_step = 5
    rig.callback.on_train_batch_end(rig.trainer, rig.module)
    rig.weights.fill_(2.0)  # the next step
    assert rig.kept == []
    held.set()
    rig.callback.wait()
    assert read(rig.run.checkpoints.at(5))["state_dict"]["a"].tolist() == [1.0] * 3


@pytest.mark.parametrize("end", ["save", "validation", "train end", "exception"])
def test_what_comes_next_waits_for_a_running_write(tmp_path, held, end):
    rig = Rig(tmp_path, steps=5, checkpoint_every=5, val_every=5)
    rig.trainer.global_step = 5
    rig.callback.on_train_batch_end(rig.trainer, rig.module)
    threading.Timer(0.2, held.set).start()
    if end == "save":
        rig.trainer.global_step = 6
        rig.callback.save(rig.trainer)
    elif end == "validation":
        rig.validate(2.0)
    elif end == "train end":
        rig.callback.on_train_end(rig.trainer, rig.module)
    else:
        rig.callback.on_exception(rig.trainer, rig.module, ValueError())
    assert 5 in rig.kept


def test_a_write_that_failed_in_the_background_is_known_and_raised(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    rig = Rig(tmp_path, checkpoint_every=5, val_every=100)
    rig.train(5)
    monkeypatch.setattr(torch, "save", full)
    rig.trainer.global_step = 10
    assert not rig.callback.failed
    rig.callback.save(rig.trainer)
    rig.callback.on_exception(rig.trainer, rig.module, ValueError())  # raises nothing
    assert rig.callback.failed
    for late in (rig.callback.wait, lambda: rig.callback.on_train_end(rig.trainer, rig.module)):
        with pytest.raises(CheckpointError, match="step-00000010 cannot be written"):
            late()
    assert rig.world.all_raised
    assert rig.kept == [5]


@pytest.mark.parametrize("first", [0, 20])
def test_the_memory_for_the_first_checkpoint_is_taken_after_the_first_step(tmp_path, first):
    rig = Rig(tmp_path, 50, first, checkpoint_every=10, val_every=1000, async_checkpoint=True)
    rig.train(first + 1)
    kept = dict(rig.callback.writer._buffers._kept)
    assert kept[("state_dict", "a")].shape == rig.weights.shape
    rig.train(first + 10)
    assert rig.written == [first + 10]
    assert rig.callback.writer._buffers._kept[("state_dict", "a")] is kept[("state_dict", "a")]


def test_without_a_background_a_checkpoint_is_there_when_save_returns(tmp_path, monkeypatch):
    monkeypatch.setattr(threading.Thread, "start", lambda self: pytest.fail("a thread"))
    rig = Rig(tmp_path, checkpoint_every=5, val_every=100, async_checkpoint=False)
    rig.trainer.global_step = 5
    rig.callback.save(rig.trainer)
    assert rig.kept == [5]


@pytest.mark.parametrize(("every", "due"), [(1, list(range(1, 13))), (5, [1, 5, 10, 12]), (100, [1, 12])])
def test_metrics_are_due_at_the_first_step_every_so_many_and_the_last(every, due):
    metrics = Metrics(every, flops_per_token=1.0)
    assert [step for step in range(1, 13) if metrics.is_due(fake_trainer(step, max_steps=12))] == due


class Logger:
    def __init__(self):
        self.logged = {}

    def log_metrics(self, metrics, step):
        self.logged[step] = metrics


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass when the test says so."""
    now = [100.0]
    monkeypatch.setattr("mixerlab.lm.training.callbacks.time.perf_counter", lambda: now[0])
    return now


def test_speed_is_tokens_of_all_micro_batches_and_ranks_in_the_time_of_training(clock):
    metrics, trainer, logger = Metrics(2, flops_per_token=1.0), fake_trainer(max_steps=100), Logger()
    trainer.loggers, trainer.world_size = [logger], 3
    module = SimpleNamespace(step_metrics={"loss": torch.tensor(2.5), "learning_rate": 0.1})
    step = [{"input_ids": torch.zeros(4, 5)}, {"input_ids": torch.zeros(2, 5)}]  # 30 tokens
    metrics.on_train_start(trainer, module)
    for _ in range(4):
        clock[0] += 2
        trainer.global_step += 1
        metrics.on_train_batch_end(trainer, module, None, step, 0)
        if trainer.global_step == 3:
            metrics.on_validation_start(trainer, module)
            clock[0] += 1000
            metrics.on_validation_end(trainer, module)
    assert list(logger.logged) == [1, 2, 4]
    assert logger.logged[1]["speed/tokens_per_second"] == 30 * 3 / 2
    assert logger.logged[4]["speed/tokens_per_second"] == 2 * 30 * 3 / 4, "the validation does not count"
    assert logger.logged[4]["train/loss"] == 2.5
    assert logger.logged[4]["train/learning_rate"] == 0.1
    assert logger.logged[4]["memory/peak_GiB"] > 0.01


@pytest.mark.parametrize(
    ("step", "validated", "made_up"),
    [(0, -1, False), (7, -1, False), (10, -1, True), (10, 10, False), (20, 10, True)],
)
def test_a_validation_that_was_due_is_made_up_for(step, validated, made_up):
    ran: list[bool] = []
    trainer = fake_trainer(step, validating=False, training=True)
    loop = SimpleNamespace(run=lambda: ran.append(trainer.validating))
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(val_loop=loop))
    PendingValidation(10).on_train_start(trainer, SimpleNamespace(validated_step=validated))
    assert ran == [True] * made_up
    assert trainer.training


def test_the_last_step_ends_the_training():
    for step, ends in ((9, False), (10, True)):
        trainer = fake_trainer(step, max_steps=10)
        StopAtTheEnd().on_train_batch_end(trainer, None, None, None, 0)
        assert trainer.should_stop == ends


def test_the_watch_hears_what_a_rank_does():
    world = World()
    signs, trainer = SignsOfLife(world), fake_trainer(4)
    heard = []
    for hook in ("train_batch_start", "before_backward", "validation_batch_start", "validation_batch_end"):
        getattr(signs, f"on_{hook}")(trainer)
        heard.append(world.doing)
    trainer.global_step = 5
    signs.on_train_batch_end(trainer)
    assert [*heard, world.doing] == [
        "in step 5",
        "in the backward pass of step 5",
        "validating after step 4",
        "validating after step 4",
        "after step 5, reading the next batch",
    ]
    assert world.place == 5
