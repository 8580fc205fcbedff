"""Does a method find the tokens that matter? Those that it finds most relevant are deleted, and others at random."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from mixerlab.lm.attribution.relevance import Relevance, score
from mixerlab.lm.model.decoder import Decoder

DELETED = 0.2
"""Share of the tokens that are deleted."""
DRAWS = 8
"""Random deletions of each text."""


@dataclass(frozen=True)
class Faithfulness:
    """How far the score fell, on average over texts."""

    chosen: float
    random: float
    error: float
    """Of the difference of the two: half of its confidence interval of 95%, by Student's t."""
    texts: int

    @property
    def difference(self) -> float:
        return self.chosen - self.random


def faithfulness(
    decoder: Decoder,
    rows: Tensor,
    method: Callable[[Decoder, Tensor, int], Relevance],
    generator: torch.Generator,
) -> Faithfulness:
    """Of the likeliest token after each text, rows (n, T) with n >= 8, for the interval's sake, and T >= 3.

    The last token stays: without it another position would be asked. The others close up.
    """
    fell: list[tuple[float, float]] = []
    for ids in rows:
        with torch.no_grad():
            target = int(decoder(ids[None])[0, -1].argmax())
        found = method(decoder, ids, target)
        n = max(1, round(DELETED * (len(ids) - 1)))
        deleted = [found.tokens[:-1].topk(n).indices.cpu()]
        deleted += [torch.randperm(len(ids) - 1, generator=generator)[:n] for _ in range(DRAWS)]
        kept = torch.ones(len(deleted), len(ids), dtype=torch.bool)
        kept[torch.arange(len(deleted))[:, None], torch.stack(deleted)] = False
        shorter = ids.expand(len(deleted), -1)[kept.to(ids.device)].view(
            len(deleted), -1
        )  # (1 + DRAWS, T - n)
        with torch.no_grad():
            fall = found.score - score(decoder, decoder.embedding(shorter), target)
        fell.append((float(fall[0]), float(fall[1:].mean())))
    chosen, random = torch.tensor(fell, dtype=torch.float64).T
    error = student(len(fell) - 1) * float((chosen - random).std()) / len(fell) ** 0.5
    return Faithfulness(float(chosen.mean()), float(random.mean()), error, len(fell))


def student(freedom: int) -> float:
    """The 97.5% quantile of Student's t, within 0.001 from 7 degrees of freedom on.

    Abramowitz & Stegun, 26.7.5, to the third power.
    """
    z = NormalDist().inv_cdf(0.975)
    terms = [
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    ]
    return sum(term / freedom**power for power, term in enumerate(terms))
