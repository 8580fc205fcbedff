"""The optimiser step: the gradient of the mean over all labels, however the rows are divided; and validation."""

import itertools
import math

import pytest
import torch

from mixerlab.data import build_data
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.training.batches import Steps, collate_micro_batches
from mixerlab.lm.training.non_finite import MOST_SKIPPED, NonFiniteError
from mixerlab.lm.training.optim import lr_factor
from mixerlab.mixers import Mixer
from one_step import attached, fake_trainer, gradients, micro_batches
from tiny_runs import TINY

UNCLIPPED = "optim.grad_clip=null"


def tiny(*overrides):
    return load_recipe(TINY, [UNCLIPPED, *overrides], check_data=False)


def expected_gradients(module, batches, n_labels=None):
    """Of the mean over all labels of `batches`, their rows in one batch."""
    module.decoder.zero_grad()
    ids, labels = (torch.cat([batch[key] for batch in batches]) for key in ("input_ids", "labels"))
    nll, _ = module.decoder(ids, labels)
    (nll.sum() / (n_labels or (labels >= 0).sum())).backward()
    expected = gradients(module)
    module.decoder.zero_grad()
    return expected


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    "counts",
    [[(9, 2, 5)], [(9,), (2,), (5,)], [(9, 2), (5,)], [(0, 9), (3, 0)], [(9,), (0,)]],
    ids=[
        "one batch",
        "micro-batches",
        "micro-batches of several sizes",
        "rows without labels",
        "none at all",
    ],
)
def test_the_gradient_is_that_of_the_mean_over_all_labels_in_one_batch(counts):
    batches = micro_batches(*counts)
    module = attached(tiny(f"trainer.accumulate={len(batches)}"))
    expected = expected_gradients(module, batches)
    module.training_step(batches, 0)
    assert_close(gradients(module), expected)


def test_micro_batches_give_the_weights_of_one_batch():
    weights = []
    rows = (9, 2, 5, 7)
    for counts in ([rows], [rows[:2], rows[2:]], [(n,) for n in rows]):
        module = attached(tiny(f"trainer.accumulate={len(counts)}", "optim.grad_clip=0.1"))
        whole = micro_batches(rows)[0]
        sizes = [len(count) for count in counts]
        parts = zip(*(whole[key].split(sizes) for key in ("input_ids", "labels")), strict=True)
        batches = [{"input_ids": ids, "labels": labels} for ids, labels in parts]
        for step in range(3):
            module.trainer.global_step = step
            module.training_step(batches, step)
        weights.append({name: p.detach() for name, p in module.decoder.named_parameters()})
    for others in weights[1:]:
        for name, weight in others.items():
            torch.testing.assert_close(weight, weights[0][name], rtol=1e-6, atol=1e-7)


def test_packed_documents_are_kept_apart(tmp_path, options, packed):
    recipe = load_recipe(TINY, [*options, *packed, UNCLIPPED])
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    rows = data.train_dataset()
    indices = Steps(recipe.seed, len(rows), recipe.trainer.batch_size).rows(0)
    (batch,) = collate_micro_batches([rows[i] for i in indices], recipe.trainer.batch_size)
    module = attached(recipe, data.vocab_size)
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels, segments in zip(
        *(batch[key] for key in ("input_ids", "labels", "segment_ids")), strict=True
    ):
        for segment in segments.unique():
            here = segments == segment
            total = total + module.decoder(ids[None, here], labels[None, here])[0].sum()
    mean = total / (batch["labels"] >= 0).sum()
    mean.backward()
    expected = gradients(module)
    module.training_step([batch], 0)
    torch.testing.assert_close(module.step_metrics["loss"], mean.detach(), rtol=1e-9, atol=0)
    assert_close(gradients(module), expected)


class Two(World):
    """One of two processes, the other of which has so many labels."""

    def __init__(self, others, rank=0):
        super().__init__(rank, devices=2)
        self.others = others

    def sum(self, value):
        is_count = not value.is_floating_point()
        return value + self.others if is_count else value


def test_the_mean_is_over_the_labels_of_all_ranks():
    batches = micro_batches((9, 2), (5, 1))
    module = attached(tiny("trainer.accumulate=2"), world=Two(others=40))
    # Averaged over the two ranks, this share of the gradient counts half.
    expected = expected_gradients(module, batches, n_labels=(17 + 40) / 2)
    module.training_step(batches, 0)
    assert_close(gradients(module), expected)


def test_the_gradient_is_clipped_and_its_norm_before_that_is_reported():
    batches = micro_batches((9, 2, 5))
    free, clipped = attached(tiny()), attached(tiny("optim.grad_clip=0.01"))
    for module in (free, clipped):
        module.training_step(batches, 0)
    norms = [torch.nn.utils.get_total_norm(gradients(module).values()) for module in (free, clipped)]
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-4)
    for module in (free, clipped):
        assert float(module.step_metrics["gradient_norm"]) == pytest.approx(float(norms[0]), rel=1e-6)
    loose = attached(tiny("optim.grad_clip=1e6"))
    loose.training_step(batches, 0)
    assert_close(gradients(loose), gradients(free))


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_every_step_has_the_learning_rate_of_the_schedule(schedule):
    recipe = tiny(f"optim.schedule={schedule}")
    module = attached(recipe)
    for step in (0, 3, 5, 12, 19):
        module.trainer.global_step = step
        module.training_step(micro_batches((4,)), step)
        rate = recipe.optim.lr * lr_factor(step, 20, recipe.optim)
        assert [group["lr"] for group in module.optimizers().param_groups] == [rate, rate]
        assert module.step_metrics["learning_rate"] == rate


def test_a_step_reports_the_rates_of_its_own_micro_batches_alone():
    batches = micro_batches((9, 2), (5,))
    module = attached(tiny("trainer.accumulate=2"))
    module.training_step(micro_batches((7,), (7,), seed=1), 0)
    with torch.no_grad():
        parts = [module.decoder(batch["input_ids"], batch["labels"]) for batch in batches]
    module.training_step(batches, 1)
    loss = float(sum(nll.sum() for nll, _ in parts) / 16)
    assert float(module.step_metrics["loss"]) == pytest.approx(loss)
    assert float(module.step_metrics["perplexity"]) == pytest.approx(math.exp(loss))
    assert float(module.step_metrics["accuracy"]) == pytest.approx(
        sum(int(hit.sum()) for _, hit in parts) / 16
    )


def test_what_is_reported_is_of_all_ranks():
    batches = micro_batches((9, 2), (5, 1))
    alone = attached(tiny("trainer.accumulate=2"), token_bytes=torch.ones(257, dtype=torch.int64))
    alone.training_step(batches, 0)

    class Same(World):
        """One of two processes that have the same rows."""

        def sum(self, value):
            return 2 * value

    world = Same(devices=2)
    both = attached(tiny("trainer.accumulate=2"), token_bytes=torch.ones(257, dtype=torch.int64), world=world)
    both.training_step(batches, 0)
    assert {"loss", "perplexity", "accuracy", "bits_per_byte"} <= set(both.step_metrics)
    for name, value in both.step_metrics.items():
        assert float(value) == pytest.approx(float(alone.step_metrics[name]), rel=1e-6), name


def test_dropout_is_drawn_anew_for_every_micro_batch_step_and_rank_and_alike_when_run_again():
    batch = micro_batches((9, 9))

    def drawn(step=0, rank=0):
        module = attached(tiny("model.dropout=0.5"), step=step, world=Two(18, rank))
        torch.manual_seed(99)  # whatever was drawn before
        module.training_step(batch, 0)
        return float(module.step_metrics["loss"])

    assert drawn() == drawn()
    assert len({drawn(), drawn(step=1), drawn(rank=1)}) == 3


def test_no_two_seeds_of_dropout_are_the_same():
    seeds = []
    for rank, seed in itertools.product(range(3), range(2)):
        recipe = tiny("trainer.accumulate=4", f"seed={seed}")
        module = attached(recipe, world=World(rank=rank, devices=3))
        seeds += [module.seed_of(step, i) for step in range(5) for i in range(4)]
    assert len(set(seeds)) == len(seeds) == 3 * 2 * 5 * 4


def test_mixers_know_how_many_micro_batches_make_a_step():
    module = attached(
        tiny("trainer.accumulate=3", "model.mixer={name: parallel, mixers: [mamba, attention]}")
    )
    mixers = [m for m in module.modules() if isinstance(m, Mixer)]
    assert len(mixers) == 6
    assert {mixer.micro_batches for mixer in mixers} == {3}


def test_low_precision_ends_with_the_forward_pass(monkeypatch):
    seen: dict[str, list[bool]] = {"forward": [], "optimiser": []}
    module = attached(tiny("trainer.precision=bf16-mixed"), double=False)
    optimizer, forward = module.optimizers(), module.decoder.forward
    step = optimizer.step

    def noted(*args, **kwargs):
        seen["forward"].append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    def stepped():
        seen["optimiser"].append(torch.is_autocast_enabled("cpu"))
        step()

    monkeypatch.setattr(module.decoder, "forward", noted)
    monkeypatch.setattr(optimizer, "step", stepped)
    module.training_step(micro_batches((9,)), 0)
    assert seen == {"forward": [True], "optimiser": [False]}


def spoil(module, monkeypatch):
    """Makes every loss of a step not a number."""
    forward = module.decoder.forward

    def spoilt(*args, **kwargs):
        nll, correct = forward(*args, **kwargs)
        return nll * float("nan"), correct

    monkeypatch.setattr(module.decoder, "forward", spoilt)


def snapshot(module):
    state = module.optimizers().state
    named = dict(module.decoder.named_parameters())
    weights = {name: p.detach().clone() for name, p in named.items()}
    moments = {name: {k: v.clone() for k, v in state[p].items()} for name, p in named.items() if p in state}
    return weights, moments


def test_a_step_that_is_left_out_changes_no_weight_and_no_average(monkeypatch, caplog):
    module = attached(tiny("trainer.on_non_finite=skip"))
    module.training_step(micro_batches((9, 3)), 0)
    before = snapshot(module)
    with monkeypatch.context() as patched:
        spoil(module, patched)
        module.trainer.global_step = 1
        module.training_step(micro_batches((9, 3)), 1)
    assert "step 2: loss nan, gradient norm nan; first not finite: the loss; left out" in caplog.text
    for ours, theirs in zip(snapshot(module)[0].items(), before[0].items(), strict=True):
        assert torch.equal(ours[1], theirs[1])
    for name, averages in snapshot(module)[1].items():
        for key, value in averages.items():
            assert torch.equal(value, before[1][name][key])
    assert module.non_finite.in_a_row == 1
    module.training_step(micro_batches((9, 3)), 2)
    assert module.non_finite.in_a_row == 0
    assert not torch.equal(snapshot(module)[0]["norm.weight"], before[0]["norm.weight"])


def test_a_step_that_is_not_finite_ends_the_run_unless_it_may_be_left_out(monkeypatch):
    module = attached(tiny())
    before, _ = snapshot(module)
    spoil(module, monkeypatch)
    with pytest.raises(
        NonFiniteError, match=r"step 1: loss nan.*The weights are as they were before this step"
    ):
        module.training_step(micro_batches((9, 3)), 0)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(module)[0].items())
    assert module.world.all_raised


def test_too_many_steps_left_out_one_after_another_end_the_run(monkeypatch):
    module = attached(tiny("trainer.on_non_finite=skip"))
    spoil(module, monkeypatch)
    for _ in range(MOST_SKIPPED - 1):
        module.training_step(micro_batches((9,)), 0)
    with pytest.raises(NonFiniteError, match=f"{MOST_SKIPPED} steps one after another"):
        module.training_step(micro_batches((9,)), 0)


class Noted:
    """A logger that keeps what it gets."""

    def __init__(self):
        self.values = {}

    def log_metrics(self, metrics, step):
        for name, value in metrics.items():
            assert (name, step) not in self.values, "logged twice"
            self.values[name, step] = value


def validated(module, batches, step=10):
    """What is logged by a validation of loaders with these batches each."""
    logger = Noted()
    module.trainer = fake_trainer(step)
    module.trainer.loggers = [logger]
    module.eval()
    with torch.no_grad():
        for loader, of_loader in enumerate(batches):
            for i, batch in enumerate(of_loader):
                module.validation_step(batch, i, loader)
        module.on_validation_epoch_end()
    return logger.values


def test_a_validation_reports_every_loader_and_what_the_mixers_do():
    token_bytes = torch.ones(257, dtype=torch.int64)
    module = attached(tiny(), token_bytes=token_bytes, valid_names=("valid", "held_out"))
    assert module.valid_loss is None
    assert module.rate_names == ["bits_per_byte", "accuracy", "loss", "perplexity"]
    batches = [micro_batches((9, 2), (5,)), micro_batches((3,), seed=1)]
    logged = validated(module, batches)
    for name, of_loader in zip(("valid", "held_out"), batches, strict=True):
        with torch.no_grad():
            sums = sum(module.decoder(b["input_ids"], b["labels"])[0].sum() for b in of_loader)
        loss = float(sums / sum((b["labels"] >= 0).sum() for b in of_loader))
        assert logged[f"{name}/loss", 10] == pytest.approx(loss)
        assert logged[f"{name}/bits_per_byte", 10] == pytest.approx(loss / math.log(2))
        assert module.valid_rates[f"{name}/loss"] == logged[f"{name}/loss", 10]
    assert module.valid_loss == module.valid_rates["valid/loss"]
    assert module.validated_step == 10
    layers = {key for key, _ in logged if key.startswith("valid_mixers/")}
    assert layers == {
        f"valid_mixers/{name}/layer_{layer}_{kind}"
        for name in ("gamma", "feedback_entropy")
        for layer in range(2)
        for kind in ("mean", "spread")
    }


def test_a_second_validation_starts_anew():
    module = attached(tiny())
    first = validated(module, [micro_batches((9, 2))])
    validated(module, [micro_batches((3,), seed=1)], step=20)
    assert validated(module, [micro_batches((9, 2))], step=30)["valid/loss", 30] == first["valid/loss", 10]


def test_without_text_there_are_no_bits_per_byte():
    module = attached(tiny())
    assert module.rate_names == ["accuracy", "loss", "perplexity"]
    assert not any("bits_per_byte" in name for name, _ in validated(module, [micro_batches((9,))]))


def test_a_loss_that_is_not_finite_is_never_the_best():
    module = attached(tiny())
    module.valid_rates = {"valid/loss": math.inf}
    assert module.valid_loss is None


def saved(module, step):
    checkpoint = {"global_step": step, "loops": {"fit_loop": {}}, "state_dict": {}}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_a_checkpoint_has_the_validation_of_its_own_step_alone():
    module = attached(tiny("trainer.accumulate=3"), world=World(devices=2))
    module.validated_step, module.valid_rates = 10, {"valid/loss": 2.0}
    then, later = saved(module, 10), saved(module, 11)
    assert (then["valid_loss"], then["metrics"]) == (2.0, {"valid/loss": 2.0})
    assert later["valid_loss"] is later["metrics"] is None
    assert then["rows_per_step"] == 4 * 3 * 2
    assert then["recipe"]["optim"]["lr"] == 0.01
    assert "loops" not in then, "the step says where it goes on"


def test_what_a_checkpoint_knows_of_its_validation_is_known_again():
    module = attached(tiny())
    module.on_load_checkpoint({"global_step": 10, "metrics": None, "loops": {}})
    assert module.validated_step == -1
    module.on_load_checkpoint({"global_step": 10, "metrics": {"valid/loss": 2.0}})
    assert module.validated_step == 10
    assert module.valid_loss == 2.0


def test_a_loaded_checkpoint_of_an_older_version_loses_lightnings_progress():
    checkpoint = {"global_step": 10, "loops": {"fit_loop": {"epoch_progress": 3}}}
    attached(tiny()).on_load_checkpoint(checkpoint)
    assert "loops" not in checkpoint
