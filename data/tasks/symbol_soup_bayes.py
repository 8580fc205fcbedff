"""The best possible answer to SymbolSoup: the posterior of the classes, for a reader who knows the styles.

Letters: n samples, W positions of the longest block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mixerlab.data.tasks.draws import Draws
from mixerlab.data.tasks.symbol_soup import (
    CLASS,
    CLASSES,
    FLIP_RATE,
    LEFT,
    LETTER,
    LETTERS,
    MOTIF_RATE,
    MOTIFS,
    RIGHT,
    SEP1,
    SEP2,
    START,
    SymbolSoup,
    SymbolSoupConfig,
    letter_probabilities,
    motif_probabilities,
)

STYLES = LEFT + RIGHT


def class_posterior(input_ids: NDArray[np.integer]) -> NDArray[np.float64]:
    """Probability of each class (n, 20), given rows of either tokenization (n, T).

    Lengths say nothing of the styles, and the order of the blocks is a fair coin.
    """
    likelihood = np.empty((len(input_ids), 2, len(STYLES)))
    for k, (letters, lengths) in enumerate(blocks(input_ids)):
        likelihood[:, k] = block_likelihoods(letters, lengths)
    left, right = likelihood[..., : len(LEFT), None], likelihood[..., None, len(LEFT) :]
    joint = np.logaddexp(left[:, 0] + right[:, 1], left[:, 1] + right[:, 0]).reshape(-1, CLASSES)
    posterior = np.exp(joint - joint.max(axis=1, keepdims=True))
    return posterior / posterior.sum(axis=1, keepdims=True)


def blocks(input_ids: NDArray[np.integer]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The letters of the first and of the second block, 0 to 15 in (n, W), and their lengths (n,)."""
    found = []
    for k in range(2):
        begin = (np.cumsum(input_ids == SEP1, axis=1) > k) & (np.cumsum(input_ids == SEP2, axis=1) == k)
        inside = begin & (input_ids >= LETTER) & (input_ids < CLASS)
        lengths = inside.sum(axis=1)
        letters = np.zeros((len(input_ids), lengths.max()), np.int64)
        letters[np.arange(letters.shape[1]) < lengths[:, None]] = input_ids[inside] - LETTER
        found.append((letters, lengths))
    return found


def block_likelihoods(letters: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """log p(block | style) (n, 9), exactly: summed over all ways to make the block of pieces and flips.

    The forward algorithm. Its state, after so many letters, is the last letter before flips, if a piece ends there.
    """
    n, W = letters.shape
    flipped = FLIP_RATE / (len(LETTERS) - 1)
    seen = np.full((W, n, len(LETTERS)), flipped)  # p(letter seen | letter written)
    np.put_along_axis(seen, letters.T[..., None], 1 - FLIP_RATE, axis=2)
    next_letter = np.stack([letter_probabilities(order) for order in STYLES])  # (9, 17, 16)
    motifs = np.array(
        [[motif_probabilities(order, left) for order in STYLES] for left in range(6)]
    )  # (6, 9, 39)
    spelt = [[LETTERS.index(letter) for letter in motif] for motif in MOTIFS]

    # Divided by the sum at each position, whose logarithms add up; the last five are kept.
    state = np.zeros((W + 1, len(STYLES), n, START + 1))
    state[0, ..., START] = 1
    scale = np.zeros((len(STYLES), n))
    result = np.zeros((n, len(STYLES)))
    for end in range(1, W + 1):
        left = lengths - end + 1  # before the letter
        rate = np.where(left >= 3, 1 - MOTIF_RATE, 1.0)
        state[end, ..., :START] = (state[end - 1] @ next_letter) * (rate[:, None] * seen[end - 1])
        for m, motif in enumerate(spelt):
            k = len(motif)
            if k <= end:
                fits = np.clip(lengths - end + k, 0, 5)
                told = np.prod([seen[end - k + j, :, letter] for j, letter in enumerate(motif)], axis=0)
                before = state[end - k].sum(axis=-1)  # (9, n)
                state[end, ..., motif[-1]] += MOTIF_RATE * motifs[fits, :, m].T * told * before
        total = state[end].sum(axis=-1)
        state[max(0, end - 4) : end + 1] /= total[..., None]
        scale += np.log(total)
        done = lengths == end
        result[done] = scale[:, done].T
    return result


def bayes_accuracy(config: SymbolSoupConfig, n_rows: int, seed: int = 0) -> float:
    """Share of rows whose most probable class is the right one: no model does better but by chance."""
    task, right = SymbolSoup(config, seed), 0
    for first in range(0, n_rows, 250):
        index = np.arange(first, min(first + 250, n_rows))
        input_ids, labels = task.make(Draws(seed, "bayes", index), index)
        right += int((class_posterior(input_ids).argmax(axis=1) == labels.max(axis=1) - CLASS).sum())
    return right / n_rows
