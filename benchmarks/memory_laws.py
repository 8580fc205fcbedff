"""The three laws of memory under diffuse routing, measured on our mixers: the table and pictures of docs/memory.md.

    python benchmarks/memory_laws.py docs [--length T]

Attention without queries spreads evenly: 1 / (t + 1). Sessa with even routing and a constant gain gamma falls as a
power, beta = 1 - gamma. Mamba-2 with constant steps forgets exponentially. The source is the first position.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mixerlab.lm.memory.curves import HELD, Curve, by_lag, lag_curve
from mixerlab.lm.memory.fits import fit
from mixerlab.lm.memory.influence import fixed_influence
from mixerlab.lm.memory.plots import influence_figure, save
from mixerlab.lm.memory.report import sentence
from mixerlab.mixers import Mixer
from mixerlab.mixers.attention import Attention, AttentionConfig
from mixerlab.mixers.mamba2 import Mamba2, Mamba2Config
from mixerlab.mixers.sessa import Sessa, SessaConfig

D = 16


def attention() -> Mixer:
    mixer = Attention(AttentionConfig(), D).double()
    nn.init.zeros_(mixer.q_proj.weight)
    return mixer


def sessa(gain: float) -> Mixer:
    mixer = Sessa(SessaConfig(), D).double()
    for projection in (mixer.q_proj, mixer.proj_fb, mixer.gamma_ctx):
        for parameter in projection.parameters():
            nn.init.zeros_(parameter)
    nn.init.constant_(mixer.gamma_bias, math.atanh(gain / mixer.sessa.gamma_max))
    return mixer


def mamba2(step: float) -> Mixer:
    mixer = Mamba2(Mamba2Config(), D).double()
    nn.init.zeros_(mixer.in_proj.weight[-mixer.n_heads :].detach())
    nn.init.zeros_(mixer.A_log)  # A = -1: the rate is the step
    nn.init.constant_(mixer.dt_bias, step + math.log(-math.expm1(-step)))
    return mixer


def measure(name: str, mixer: Mixer, length: int) -> Curve:
    x = torch.randn(1, 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    influence = fixed_influence(mixer, x.expand(1, length, D), [0])  # the same input everywhere
    assert influence is not None
    return lag_curve(name, HELD, np.arange(1.0, length), by_lag(influence, [0]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="memory_laws.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where memory-laws.png goes")
    parser.add_argument("--length", type=int, default=4097)
    args = parser.parse_args(arguments)
    mixers = {
        "attention": attention(),
        **{f"Sessa, gain {gain}": sessa(gain) for gain in (0.1, 0.5, 0.9)},
        **{f"Mamba-2, step {step}": mamba2(step) for step in (0.002, 0.01)},
    }
    curves = [measure(name, mixer, args.length) for name, mixer in mixers.items()]
    fits = [fit(curve) for curve in curves]
    for curve, found in zip(curves, fits, strict=True):
        print(f"{curve.subject}: {sentence(curve, found)}")
    save(influence_figure(curves, fits), args.folder / "memory-laws.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
