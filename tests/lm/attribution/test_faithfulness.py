"""Deleting what a method finds, against deleting at random."""

import pytest
import torch

import mixerlab.lm.attribution.faithfulness as module
from mixerlab.lm.attribution.faithfulness import faithfulness, student
from mixerlab.lm.attribution.mamba_lrp import mamba_lrp
from mixerlab.lm.attribution.relevance import Relevance, score
from mixerlab.lm.memory.subject import run_subject
from mixerlab.lm.run.folder import Run
from small_decoders import decoder_of
from tiny_runs import places, run_dirs, train


@pytest.fixture
def decoder():
    return decoder_of("attention", 0.3, n_layers=1)


ROWS = torch.randint(11, (12, 11), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def left_out(decoder, ids, target):
    """How far the score falls where each token alone is left out."""
    whole = score(decoder, decoder.embedding(ids[None]), target)[0]
    falls = [
        whole - score(decoder, decoder.embedding(torch.cat((ids[:i], ids[i + 1 :]))[None]), target)[0]
        for i in range(len(ids))
    ]
    return Relevance(torch.stack(falls), 0.0, whole.item())


def opposite(decoder, ids, target):
    found = left_out(decoder, ids, target)
    return Relevance(-found.tokens, 0.0, found.score)


def test_a_method_that_knows_beats_chance_and_its_opposite_loses(decoder):
    good, bad = (
        faithfulness(decoder, ROWS, method, torch.Generator().manual_seed(0))
        for method in (left_out, opposite)
    )
    assert good.texts == len(ROWS)
    assert good.difference > good.error > 0
    assert bad.difference < -bad.error < 0
    assert good.random == bad.random, "the same draws"


def test_as_many_are_deleted_at_random_and_the_last_token_stays(decoder, monkeypatch):
    seen = []

    def watched(decoder, x, target):
        seen.append(x)
        return score(decoder, x, target)

    def favours_the_last(decoder, ids, target):
        return Relevance(torch.arange(len(ids), dtype=torch.float64), 0.0, 0.0)

    monkeypatch.setattr(module, "score", watched)
    faithfulness(decoder, ROWS[:2], favours_the_last, torch.Generator())
    for x, ids in zip(seen, ROWS, strict=False):
        assert x.shape == (1 + module.DRAWS, 11 - 2, 8)
        assert (x[:, -1] == decoder.embedding(ids)[-1]).all()
        torch.testing.assert_close(x[0], decoder.embedding(torch.cat((ids[:8], ids[-1:]))))


@pytest.mark.parametrize(("freedom", "quantile"), [(7, 2.3646), (11, 2.2010), (31, 2.0395), (10**6, 1.9600)])
def test_quantiles_are_those_of_tables(freedom, quantile):
    assert student(freedom) == pytest.approx(quantile, abs=1e-3)


def test_the_interval_is_that_of_students_t(decoder, monkeypatch):
    """Of falls that are known: of chosen tokens 0 to 7, of random ones 1."""
    falls = iter(range(8))

    def known(decoder, x, target):
        return -torch.tensor([float(next(falls)), *[1.0] * module.DRAWS])

    monkeypatch.setattr(module, "score", known)
    method = lambda decoder, ids, target: Relevance(torch.zeros(len(ids)), 0.0, 0.0)  # noqa: E731
    found = faithfulness(decoder, ROWS[:8], method, torch.Generator())
    assert (found.chosen, found.random, found.difference) == (3.5, 1.0, 2.5)
    # The variance of 0 to 7 is 6, and the 97.5% quantile of t with 7 degrees of freedom 2.3646.
    assert found.error == pytest.approx(2.3646 * (6 / 8) ** 0.5, rel=1e-3)


@pytest.mark.slow
def test_on_a_trained_mamba_relevance_finds_more_than_chance(tmp_path, at_the_root):
    options = ["model.mixer=mamba", "data.seq_len=64", "trainer.steps=300"]
    options += ["trainer.val_batches=1", "logging.sample_tokens=0"]
    assert train("quickstart", *options, *places(tmp_path)) == 0
    subject = run_subject(Run(run_dirs(tmp_path, "quickstart")[0]), length=64, sequences=32)
    decoder = next(subject.decoders()).double()
    found = faithfulness(decoder, subject.tokens, mamba_lrp, torch.Generator().manual_seed(0))
    assert found.difference > found.error
