"""Is our attention a fair baseline? How often, and how early, it learns MQAR, beside transformers' Llama.

    python benchmarks/mqar_baseline.py [--models llama ours ours,norm=rmsnorm,tie_embeddings=false ...] [--help]

A model is `llama`, LlamaForCausalLM with its own initial weights, or `ours`, a decoder of attention in transformer
blocks of the same shape, with its defaults or the given arguments of `Decoder`; `weights=llama` begins with Llama's
weights. Runs of one seed and learning rate see the same rows in the same order, with a recipe's default optimiser.
Models stay for a while near 1/pairs, saying any of a row's values. A run has left that plateau, and ends, at the first
step after which it is right on `--threshold` of the held-out queries. One thread; times depend on it, counts do not.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from mixerlab.data import build_data
from mixerlab.data.tasks.task import TaskRows
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.recipe.schema import OptimConfig
from mixerlab.lm.training.optim import lr_factor

Logits = Callable[[Tensor], Tensor]
"""(B, T) tokens -> logits (B, T, V)."""

HIDDEN = 192
"""Width of the MLP, by our rule for a model that is 64 wide."""


@dataclass
class Outcome:
    left: float
    """The step after which the plateau was left; infinite if it was not."""
    accuracy: float
    seconds: float


def llama(args: argparse.Namespace, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=64,
            intermediate_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=args.seq_len,
        )
    )


def ours(args: argparse.Namespace, seed: int, weights: str | None = None, **options) -> Decoder:
    mixer = {"name": "attention", "n_heads": 4}
    shape = {"d_model": 64, "n_layers": 2, "mixer": mixer, "block": "transformer", "mlp_dim": HIDDEN}
    decoder = Decoder(args.vocab_size, **{**shape, **options})
    decoder.initialize(seed)
    if weights == "llama":
        decoder.load_state_dict(renamed(llama(args, seed)))
    return decoder


def renamed(model: LlamaForCausalLM) -> dict[str, Tensor]:
    """Llama's weights as those of a decoder with norm=rmsnorm and tie_embeddings=false."""
    places = {
        "model.embed_tokens": "embedding",
        "model.layers": "blocks",
        "model.norm": "norm",
        "lm_head": "head",
        "input_layernorm": "norm",
        "post_attention_layernorm": "mlp_norm",
        "self_attn": "mixer",
        "o_proj": "out_proj",
        **{f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")},
    }
    found = {}
    for name, weight in model.state_dict().items():
        for theirs, our in places.items():
            name = name.replace(theirs, our)
        if ".q_proj" in name or ".k_proj" in name:  # theirs rotates (i, i + K/2), ours (2i, 2i + 1)
            weight = weight.unflatten(0, (4, 2, -1)).transpose(1, 2).flatten(0, 2)
        found[name] = weight
    return found


def build(model: str, args: argparse.Namespace, seed: int) -> tuple[nn.Module, Logits]:
    name, *pairs = model.split(",")
    if name == "llama" and not pairs:
        theirs = llama(args, seed)
        return theirs, lambda ids: theirs(ids).logits
    options = {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}
    if name != "ours":
        raise SystemExit(f"--models {model}: expected llama, or ours and arguments of Decoder")
    decoder = ours(args, seed, **options)
    return decoder, decoder


def train(model: nn.Module, logits: Logits, lr: float, seed: int, args: argparse.Namespace) -> Outcome:
    began, accuracy = time.perf_counter(), 0.0
    task = {"seq_len": args.seq_len, "n_pairs": args.pairs, "vocab_size": args.vocab_size}
    data = build_data({"name": "mqar", "n_train": args.steps * args.batch_size, "n_valid": 256, **task}, seed)
    rows, valid = data.train_dataset(), data.val_datasets()["valid"]
    assert isinstance(rows, TaskRows)
    assert isinstance(valid, TaskRows)
    held_out = valid.batch(range(256))
    config = OptimConfig(lr=lr)
    matrices, others = [[p for p in model.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False)]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    for step in range(args.steps):
        ids, labels = rows.batch(range(step * args.batch_size, (step + 1) * args.batch_size))
        F.cross_entropy(logits(ids).flatten(0, 1), labels.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = lr * lr_factor(step, args.steps, config)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            with torch.no_grad():
                asked = held_out[1] >= 0
                right = logits(held_out[0]).argmax(-1)[asked] == held_out[1][asked]
            accuracy = right.double().mean().item()
            progress(f"step {step + 1} of {args.steps}: {accuracy:.3f}")
            if accuracy >= args.threshold:
                break
    progress("")
    left = step + 1 if accuracy >= args.threshold else math.inf
    return Outcome(left, accuracy, time.perf_counter() - began)


def progress(message: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{message}", end="", file=sys.stderr, flush=True)


def as_often(first: Sequence[Outcome], second: Sequence[Outcome]) -> float:
    """Fisher's exact test, two-sided: p of counts at least as improbable if both leave the plateau as often."""
    n, m = len(first), len(second)
    k = sum(run.left < math.inf for run in [*first, *second])
    ways = {i: math.comb(n, i) * math.comb(m, k - i) for i in range(max(0, k - m), min(n, k) + 1)}
    seen = ways[sum(run.left < math.inf for run in first)]
    return sum(way for way in ways.values() if way <= seen) / sum(ways.values())


def as_early(first: Sequence[Outcome], second: Sequence[Outcome]) -> float:
    """p of mean ranks at least as far apart if both leave it as early; by 20000 random divisions of the runs."""
    lefts = np.array([run.left for run in [*first, *second]])
    ranks = (lefts[:, None] > lefts).sum(1) + (lefts[:, None] == lefts).sum(1) / 2
    random = np.random.default_rng(0)
    sums = [random.permutation(ranks)[: len(first)].sum() for _ in range(20_000)]
    expected = ranks.mean() * len(first)
    return float(np.mean(abs(np.array(sums) - expected) >= abs(ranks[: len(first)].sum() - expected) - 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["llama", "ours"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    parser.add_argument("--lr", nargs="+", type=float, default=[1e-3, 3e-3])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threshold", type=float, default=0.9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[tuple[str, float], list[Outcome]] = {}
    for seed in args.seeds:
        for lr in args.lr:
            for model in args.models:
                outcome = train(*build(model, args, seed), lr, seed, args)
                runs.setdefault((model, lr), []).append(outcome)
                line = f"seed {seed}  lr {lr:g}  {model}: left at {outcome.left:g}, "
                print(f"{line}{outcome.accuracy:.3f} at the end, {outcome.seconds:.0f} s", flush=True)
    print(f"\n{'lr':>8} | {'left the plateau':>16} | {'median step':>11} | model")
    for model in args.models:
        for lr in args.lr:
            found = runs[model, lr]
            often = f"{sum(run.left < math.inf for run in found)} of {len(found)}"
            median = statistics.median_high(run.left for run in found)
            print(f"{lr:>8g} | {often:>16} | {median:>11g} | {model}")
    first, *others = [[run for lr in args.lr for run in runs[model, lr]] for model in args.models]
    for model, other in zip(args.models[1:], others, strict=True):
        print(f"{model} against {args.models[0]}: as often, p = {as_often(first, other):.3f}; ", end="")
        print(f"as early, p = {as_early(first, other):.3f}")


if __name__ == "__main__":
    main()
