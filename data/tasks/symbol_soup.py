"""SymbolSoup: which two styles wrote the two blocks of letters that noise surrounds? (arXiv 2604.18580, section 5.1)

Letters: n samples, M letters of a row, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.module import Rows
from mixerlab.data.registry import register_data
from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.task import Ids, Task, TaskConfig, unlabelled
from mixerlab.options import option

LETTERS = "abcdefghijklmnop"
LEFT = ("jdifchklanogmpeb", "bjmkpnhgacdloife", "ngpfediojcmabhlk", "gpcknjaoldhifemb")
RIGHT = ("fmpeldcbijakngho", "lfpoakjhigmdnceb", "kbjegaiplhocmfdn", "opfmedbkanjilhgc", "lnagobhfcikjedmp")
"""Orders of the letters. Of each style the first four letters are its primaries, the next four its secondaries."""

CLASSES = len(LEFT) * len(RIGHT)

MOTIFS = [LETTERS[i : i + k] for k in (3, 4, 5) for i in range(len(LETTERS) - k + 1)]
MOTIF_RATE = 0.3
FLIP_RATE = 0.03

PAD, BOS, SEP1, SEP2, SEP, LABEL, SPACE, NEWLINE, LETTER = range(9)
CLASS = LETTER + len(LETTERS)
"""Ids: the letters are LETTER + 0 to 15, the classes CLASS + 0 to 19."""

PIECES = [*LETTERS, *MOTIFS, ""]
"""What a block is made of. The last piece is for blocks that are full."""

NONE = 255
SPELT = np.full((len(PIECES), 5), NONE, np.uint8)
for _row, _piece in zip(SPELT, PIECES, strict=True):
    _row[: len(_piece)] = [LETTERS.index(letter) for letter in _piece]
PIECE_LENGTHS = np.array([len(piece) for piece in PIECES])
LAST_LETTERS = np.array([LETTERS.index(piece[-1]) if piece else 0 for piece in PIECES])

START = len(LETTERS)
"""In the place of the previous letter: there is none."""


@dataclass
class SymbolSoupConfig(TaskConfig):
    """The lengths count characters of the text form, 2 M + 13 for M letters."""

    min_tokens: int = option(400, "characters of the shortest text", min=1)
    max_tokens: int = option(600, "characters of the longest text", min=23)
    tokenization: Literal["chars", "letters"] = option(
        "chars", "chars (spaces and newlines are tokens too), or letters (half as long)"
    )
    n_train: int = option(20_000, "rows to train on, as many of each class", min=1)
    n_valid: int = option(2_000, "rows of the datasets `valid` and `test` each, as many of each class", min=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.min_tokens > self.max_tokens:
            yield "min_tokens", f"at most max_tokens = {self.max_tokens} is needed"
        for name in ("n_train", "n_valid"):
            if getattr(self, name) % CLASSES:
                yield name, f"a multiple of {CLASSES} is needed, as many rows of each of {CLASSES} classes"

    @property
    def letters(self) -> tuple[int, int]:
        """The smallest and the largest M."""
        return max(5, -((13 - self.min_tokens) // 2)), max(5, (self.max_tokens - 13) // 2)


@register_data("symbol_soup", SymbolSoupConfig)
class SymbolSoup(Task):
    """Which two of nine styles wrote the two blocks of letters that noise surrounds? (arXiv 2604.18580)"""

    config: SymbolSoupConfig
    vocab_size = CLASS + CLASSES

    def __init__(self, config: SymbolSoupConfig, seed: int) -> None:
        super().__init__(config, seed)
        longest = config.letters[1] + 7  # and seven special tokens
        self.seq_len = longest if config.tokenization == "letters" else 2 * longest - 1

    def train_dataset(self) -> Rows:
        return self.dataset("train", self.config.n_train)

    def val_datasets(self) -> dict[str, Rows]:
        return {name: self.dataset(name, self.config.n_valid) for name in ("valid", "test")}

    def make(self, draws: Draws, index: Ids) -> tuple[NDArray, NDArray]:
        label = index % CLASSES
        lengths, styles = layout(draws, label, *self.config.letters)
        ids, last = assemble(draws, lengths, styles, self.config.letters[1])
        if self.config.tokenization == "chars":
            ids, last = with_white_space(ids), 2 * last
        labels = unlabelled(*ids.shape)
        np.put_along_axis(labels, last[:, None], CLASS + label[:, None], axis=1)
        return ids, labels


def layout(draws: Draws, label: Ids, fewest: int, most: int) -> tuple[Ids, Ids]:
    """Lengths (n, 5) of noise, block, noise, block, noise, and of which styles the blocks are (n, 2), 0 to 8."""
    M = draws.integers(fewest, most)
    low = np.maximum(3, 3 * M // 10)
    noise = np.minimum(draws.integers(low, np.maximum(low, 6 * M // 10)), M - 2)
    left = draws.integers(1, M - noise - 1)
    first = draws.integers(1, noise - 2)
    second = draws.integers(1, noise - first - 1)
    blocks = np.stack([left, M - noise - left], axis=1)
    styles = np.stack([label // len(RIGHT), len(LEFT) + label % len(RIGHT)], axis=1)
    swapped = draws.integers(0, 1) == 1
    blocks[swapped], styles[swapped] = blocks[swapped, ::-1], styles[swapped, ::-1]
    return np.stack([first, blocks[:, 0], second, blocks[:, 1], noise - first - second], axis=1), styles


def assemble(draws: Draws, lengths: Ids, styles: Ids, most: int) -> tuple[NDArray[np.uint8], Ids]:
    """Rows without white space (n, most + 7), and where their last token is (n,)."""
    position = np.arange(most + 7)
    # <bos> noise <sep1> block <sep2> noise <sep1> block <sep2> noise <sep> <label>
    specials = np.array([BOS, SEP1, SEP2, SEP1, SEP2, SEP, LABEL])
    after = np.cumsum(np.pad(lengths + 1, ((0, 0), (1, 0))), axis=1)  # (n, 6) where the first six are
    where = np.concatenate([after, after[:, -1:] + 1], axis=1)
    ids = (LETTER + (draws.bits(most + 7) >> np.uint64(60))).astype(np.uint8)
    styled = np.zeros(ids.shape, bool)
    for begin, end in ((1, 2), (3, 4)):
        styled |= (position > where[:, begin, None]) & (position < where[:, end, None])
    turn = flips(draws.uniform(most + 7))
    # Last, because how many numbers it draws is up to the longest block.
    chosen = choose_pieces(draws, styles.reshape(-1), lengths[:, [1, 3]].reshape(-1))
    spelt = SPELT[chosen]  # (2 n, pieces, 5)
    ids[styled] = LETTER + (spelt[spelt != NONE] + turn[styled]) % len(LETTERS)
    ids[position > where[:, -1, None]] = PAD
    np.put_along_axis(ids, where, specials[None].astype(np.uint8), axis=1)
    return ids, where[:, -1]


def flips(u: NDArray[np.floating]) -> NDArray[np.uint8]:
    """How far each letter is moved round the alphabet, to become one of the 15 others; 0 for nearly all."""
    others = len(LETTERS) - 1
    return np.where(u < FLIP_RATE, 1 + u * (others / FLIP_RATE), 0).astype(np.uint8)


def choose_pieces(draws: Draws, styles: Ids, lengths: Ids) -> NDArray[np.uint8]:
    """The pieces of which blocks are made.

    All blocks grow together, a piece at a time. They are those of the n samples of `draws`, as many of each.

    Args:
        styles: (blocks,) each of 0 to 8.
        lengths: (blocks,) letters.

    Returns:
        (blocks, most pieces of one), the last piece of PIECES where a block was full already.
    """
    cumulative, together = cumulative_probabilities(), 16
    each = len(styles) // len(draws.keys)
    left, previous = lengths.copy(), np.full(len(styles), START)
    chosen: list[NDArray[np.uint8]] = []
    while left.any():
        # Of 40 bits, so that nothing is rounded where the number of the distribution is added.
        u = (draws.bits(each, together) >> np.uint64(24)).reshape(len(styles), together) * 2.0**-40
        for step in range(together):
            distribution = (styles * (START + 1) + previous) * 6 + np.minimum(left, 5)
            place = np.searchsorted(cumulative, distribution + u[:, step], side="right")
            piece = place - distribution * len(PIECES)
            left -= PIECE_LENGTHS[piece]
            previous = LAST_LETTERS[piece]
            chosen.append(piece.astype(np.uint8))
    return np.stack(chosen, axis=1)


def roles(order: str) -> tuple[list[int], list[int]]:
    """Primaries and secondaries of a style, as numbers of letters."""
    numbers = [LETTERS.index(letter) for letter in order]
    return numbers[:4], numbers[4:8]


def letter_probabilities(order: str) -> NDArray[np.float64]:
    """(17, 16) of the next letter after each previous one; after none in the last row."""
    primary, secondary = roles(order)
    unigram = np.ones(len(LETTERS))
    unigram[primary], unigram[secondary] = 3, 2
    weights = np.tile(unigram, (START + 1, 1))
    for i in range(4):
        p, s, following = primary[i], secondary[i], primary[(i + 1) % 4]
        for before, after in ((p, following), (p, p), (s, s), (p, s), (s, p)):
            weights[before, after] *= 4
    return weights / weights.sum(axis=1, keepdims=True)


def motif_probabilities(order: str, left: int) -> NDArray[np.float64]:
    """(39,) of each motif where so many letters are left; all 0 where none fits."""
    primary, secondary = roles(order)
    spelt = [{LETTERS.index(letter) for letter in motif} for motif in MOTIFS]
    weights = np.array([1 + 0.9 * len(m & set(primary)) + 0.5 * len(m & set(secondary)) for m in spelt])
    weights[np.array([len(motif) for motif in MOTIFS]) > left] = 0
    return weights / max(weights.sum(), 1)


@cache
def cumulative_probabilities() -> NDArray[np.floating]:
    """Of PIECES, for each style, previous letter and number of letters left (0 to 4, or more), one after another.

    The d-th distribution goes up from d to d + 1, so that a search for d + u finds the piece.
    """
    table = np.zeros((len(LEFT) + len(RIGHT), START + 1, 6, len(PIECES)))
    for style, order in enumerate(LEFT + RIGHT):
        table[style, :, 0, -1] = 1
        for left in range(1, 6):
            rate = MOTIF_RATE if left >= 3 else 0
            table[style, :, left, : len(LETTERS)] = (1 - rate) * letter_probabilities(order)
            table[style, :, left, len(LETTERS) : -1] = rate * motif_probabilities(order, left)
    cumulative: NDArray[np.floating] = table.reshape(-1, len(PIECES)).cumsum(axis=1)
    cumulative /= cumulative[:, -1:]
    return (cumulative + np.arange(len(cumulative))[:, None]).reshape(-1)


def with_white_space(ids: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, T) -> (n, 2 T - 1): specials on lines of their own, spaces between letters and before <label>."""
    special = (ids < SPACE) & (ids != PAD)
    between = np.where(special[:, :-1] | special[:, 1:], NEWLINE, SPACE)
    between[ids[:, 1:] == LABEL] = SPACE
    between[ids[:, 1:] == PAD] = PAD
    text = np.full((len(ids), 2 * ids.shape[1] - 1), PAD, np.uint8)
    text[:, ::2], text[:, 1::2] = ids, between
    return text
