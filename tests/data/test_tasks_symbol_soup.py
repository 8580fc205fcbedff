"""SymbolSoup against a loop that is written from the definition, its statistics, and its ceiling."""

import random
import re
from collections import Counter
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from mixerlab.data import build_data
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.symbol_soup import PIECES, SymbolSoupConfig, choose_pieces, flips
from mixerlab.data.tasks.symbol_soup_bayes import bayes_accuracy, block_likelihoods, blocks, class_posterior
from symbol_soup_loop import ALPHABET, STYLES, Loop, distributions
from tasks import rows, within_sampling_error

N = 20_000
TOKENS = ["", "<bos>", "<sep1>", "<sep2>", "<sep>", "<label>", " ", "\n", *ALPHABET]
ROW = re.compile("<bos>([a-p]+)<sep1>([a-p]+)<sep2>([a-p]+)<sep1>([a-p]+)<sep2>([a-p]+)<sep><label>")


@cache
def letters_rows():
    return rows("symbol_soup", tokenization="letters", n=N)


@cache
def parsed():
    """Of 20000 rows: the noise, block, noise, block, noise."""
    return [ROW.fullmatch("".join(TOKENS[i] for i in row)).groups() for row in letters_rows()[0].tolist()]


def test_a_row_is_the_text_of_the_definition():
    ids, labels = rows("symbol_soup", n=40)
    for row, label, pieces in zip(ids.tolist(), labels, parsed(), strict=False):
        text = "".join(TOKENS[i] for i in row)
        assert text == Loop(None).text(pieces)
        tokens = len(re.sub("<[a-z0-9]+>", "#", text))
        assert tokens == 2 * sum(map(len, pieces)) + 13
        (place,) = np.flatnonzero(label != -100)
        assert row[place] == TOKENS.index("<label>")
        assert place == tokens - 1
        assert set(row[tokens:]) <= {0}


def test_both_tokenizations_have_the_same_label_at_their_last_token():
    ids, labels = letters_rows()
    _, labels_of_chars = rows("symbol_soup", n=40)
    assert (labels[:40].max(axis=1) == labels_of_chars.max(axis=1)).all()
    place = (labels != -100).argmax(axis=1)
    assert (ids[np.arange(N), place] == TOKENS.index("<label>")).all()
    assert ((labels != -100).sum(axis=1) == 1).all()


@pytest.mark.parametrize("dataset", ["train", "valid", "test"])
def test_each_class_has_as_many_rows(dataset):
    data = build_data({"name": "symbol_soup", "n_train": 200, "n_valid": 40}, 0)
    dataset = {"train": data.train_dataset(), **data.val_datasets()}[dataset]
    labels = dataset.batch(range(len(dataset)))[1].numpy().max(axis=1)
    assert (np.bincount(labels)[24:] == len(dataset) // 20).all()
    assert len(np.bincount(labels)) == 44


def tenths(value, low, high):
    """Counts of ten equal parts of the range, and how many are expected in each, given the range of each sample."""
    part = lambda number: np.floor(10 * (number - low + 0.5) / (high - low + 1)).astype(int)  # noqa: E731
    expected, width = np.zeros(10), high - low + 1
    for k in range(int(width.max())):
        inside = k < width
        np.add.at(expected, part(np.minimum(low + k, high))[inside], 1 / width[inside])
    return np.bincount(part(value), minlength=10), expected


def test_lengths_are_uniform_in_their_ranges():
    n = np.array([[len(piece) for piece in pieces] for pieces in parsed()])
    M, noise = n.sum(axis=1), n[:, ::2].sum(axis=1)
    low = np.floor(0.3 * M)
    first = n[:, 0]
    for value, smallest, largest in (
        (M, np.full(N, 194), np.full(N, 293)),
        (noise, low, np.floor(0.6 * M)),
        (n[:, 1], np.ones(N), M - noise - 1),
        (first, np.ones(N), noise - 2),
        (n[:, 2], np.ones(N), noise - first - 1),
    ):
        assert (smallest <= value).all()
        assert (value <= largest).all()
        counts, expected = tenths(value, smallest, largest)
        assert within_sampling_error(counts, expected)
        for edge in (smallest, largest):
            expected = (1 / (largest - smallest + 1)).sum()
            assert abs((value == edge).sum() - expected) < 5 * expected**0.5


def test_noise_is_uniform_in_letters_and_pairs():
    noise = [pieces[k] for pieces in parsed()[:4000] for k in (0, 2, 4)]
    single, pairs = (
        Counter("".join(noise)),
        Counter(a + b for text in noise for a, b in pairwise(text)),
    )
    for counts, cells in ((single, 16), (pairs, 256)):
        assert within_sampling_error([*counts.values()], counts.total() / cells)
        assert len(counts) == cells


def test_letters_and_pairs_of_blocks_are_those_of_the_loop():
    """Per class of style, each rate within five standard errors; these are taken over rows."""
    loop, few = Loop(random.Random(0)), 1200
    looped = [loop.pieces(i % 20) for i in range(few)]
    ours = [count(pieces) for pieces in parsed()]
    theirs = [count(pieces) for pieces in looped]
    for of_style in [lambda c, s=s: c // 5 == s for s in range(4)] + [
        lambda c, s=s: c % 5 == s for s in range(5)
    ]:
        a = np.array([row for i, row in enumerate(ours) if of_style(i % 20)])
        b = np.array([row for i, row in enumerate(theirs) if of_style(i % 20)])
        error = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
        often = b.sum(axis=0) >= 50
        assert often[:16].all()
        assert often.sum() > 150
        assert (abs(a.mean(axis=0) - b.mean(axis=0)) < 5 * error)[often].all()


def count(pieces):
    """(16 + 256,) letters and pairs of letters in both blocks."""
    counts = np.zeros(272)
    for text in (pieces[1], pieces[3]):
        numbers = np.frombuffer(text.encode(), np.uint8).astype(int) - ord("a")
        counts[:16] += np.bincount(numbers, minlength=16)
        counts[16:] += np.bincount(16 * numbers[:-1] + numbers[1:], minlength=256)
    return counts


@pytest.mark.parametrize("style", range(9))
def test_pieces_have_their_probabilities(style):
    """Motifs and letters, at the beginning, inside, and where only some fit."""
    chosen = choose_pieces(Draws(0, "train", np.arange(N)), np.full(N, style), np.full(N, 30))
    lengths, last = np.array([*map(len, PIECES)]), np.array([ord(piece[-1:] or "a") for piece in PIECES])
    left, before = np.full(N, 30), np.full(N, 0)
    counts: Counter = Counter()
    for pieces in chosen.T:
        keys = np.stack([np.minimum(left, 5), before, pieces], axis=1)[left > 0]
        for key, n in zip(*np.unique(keys, axis=0, return_counts=True), strict=True):
            counts[*key.tolist()] += int(n)
        left, before = left - lengths[pieces], last[pieces]
    assert (left == 0).all()
    assert {left for left, _, _ in counts} == {1, 2, 3, 4, 5}
    for letters, before in {(letters, before) for letters, before, _ in counts}:
        seen = {PIECES[i]: n for (*where, i), n in counts.items() if where == [letters, before]}
        probability = distributions([*STYLES][style], letters, chr(before) if before else "")
        assert set(seen) <= set(probability)
        if (total := sum(seen.values())) >= 1000:  # small counts are not normal
            expected = total * np.array([*probability.values()])
            assert within_sampling_error([seen.get(piece, 0) for piece in probability], expected)
    for remaining in (3, 4, 5):  # motifs, and how many there are, do not depend on the letter before
        tally = Counter({PIECES[i]: 0 for i in range(16, len(PIECES) - 1)})
        for (where, _, i), n in counts.items():
            if where == remaining:
                tally[PIECES[i] if i >= 16 else "a letter"] += n
        probability = {
            text: p for text, p in distributions([*STYLES][style], remaining, "").items() if len(text) > 1
        }
        probability["a letter"] = 0.7
        expected = tally.total() * np.array([probability.get(text, 0) for text in tally])
        assert within_sampling_error([*tally.values()], expected)


def test_flips_are_rare_and_turn_to_every_other_letter():
    turned = flips(Draws(0, "train", np.arange(N)).uniform(50))
    counts = np.bincount(turned.ravel(), minlength=16)
    assert within_sampling_error(counts, turned.size * np.array([0.97, *[0.03 / 15] * 15]))


# The ceiling


@cache
def spelt(style, length, before=""):
    """Text -> probability, before flips, of what remains of a block."""
    if length == 0:
        return {"": 1.0}
    found: Counter = Counter()
    for piece, p in distributions(style, length, before).items():
        for rest, q in spelt(style, length - len(piece), piece[-1]).items():
            found[piece + rest] += p * q
    return found


@pytest.mark.parametrize("text", ["a", "gj", "cde", "efgh"])
def test_the_likelihood_of_a_block_is_the_sum_over_all_ways_to_write_it(text):
    numbers = np.array([[ALPHABET.index(letter) for letter in text]])
    found = block_likelihoods(np.pad(numbers, ((0, 0), (0, 3))), np.array([len(text)]))[0]
    for style, value in zip(STYLES, found, strict=True):
        total = sum(
            p * np.prod([0.97 if a == b else 0.002 for a, b in zip(text, clean, strict=True)])
            for clean, p in spelt(style, len(text)).items()
        )
        assert np.exp(value) == pytest.approx(total, rel=1e-9)


def test_the_likelihoods_of_all_blocks_of_a_length_sum_to_one():
    every = np.array([*product(range(16), repeat=3)])
    found = np.exp(block_likelihoods(every, np.full(len(every), 3)))
    assert found.sum(axis=0) == pytest.approx(1, rel=1e-9)


def test_the_posterior_is_the_same_for_both_tokenizations():
    few = {"min_tokens": 40, "max_tokens": 60, "n": 50}
    a, b = (class_posterior(rows("symbol_soup", tokenization=t, **few)[0]) for t in ("chars", "letters"))
    assert (a == b).all()
    assert a.sum(axis=1) == pytest.approx(1)


def test_the_posterior_says_how_often_it_is_right():
    """Its mean over the rows' own classes is that of its squares summed: it is no more certain than it may be."""
    ids, labels = rows("symbol_soup", min_tokens=60, max_tokens=100, n=2000)
    posterior = class_posterior(ids)
    own = posterior[np.arange(2000), labels.max(axis=1) - 24]
    difference = own - (posterior**2).sum(axis=1)
    assert abs(difference.mean()) < 5 * difference.std() / 2000**0.5


def test_the_order_of_the_blocks_is_a_fair_coin():
    """How probable it is, given a row and its class, that the left style came first: one half on average."""
    ids, labels = rows("symbol_soup", min_tokens=60, max_tokens=100, n=2000)
    first, second = (block_likelihoods(*block) for block in blocks(ids))
    label, each = labels.max(axis=1) - 24, np.arange(2000)
    left, right = label // 5, 4 + label % 5
    kept, swapped = first[each, left] + second[each, right], first[each, right] + second[each, left]
    p = 1 / (1 + np.exp(swapped - kept))
    assert abs(p.mean() - 0.5) < 5 * p.std() / 2000**0.5
    assert p.std() > 0.2, "rows tell their order"


def test_the_ceiling_at_400_to_600():
    assert bayes_accuracy(SymbolSoupConfig(tokenization="letters"), 800) == pytest.approx(0.806, abs=0.03)


@pytest.mark.parametrize(
    "clue", ["first letter", "last letter", "letters", "lengths of blocks", "lengths of noise"]
)
def test_what_is_not_a_style_tells_nothing_of_the_class(clue):
    """A table of the most common class for each value of the clue, from half of the rows, tried on the others."""
    tell = {
        "first letter": lambda p: p[0][0],
        "last letter": lambda p: p[4][-1],
        "letters": lambda p: sum(map(len, p)),
        "lengths of blocks": lambda p: (len(p[1]) // 10, len(p[3]) // 10),
        "lengths of noise": lambda p: (len(p[0]) // 10, len(p[2]) // 10),
    }[clue]
    table: dict = {}
    for i, pieces in enumerate(parsed()[: N // 2]):
        table.setdefault(tell(pieces), Counter())[i % 20] += 1
    guesses = [table.get(tell(pieces), Counter({0: 1})).most_common(1)[0][0] for pieces in parsed()[N // 2 :]]
    right = np.mean([guess == i % 20 for i, guess in enumerate(guesses)])
    assert right < 0.05 + 5 * (0.05 * 0.95 / (N / 2)) ** 0.5
