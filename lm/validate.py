"""The validation losses of a trained run: python -m lm.validate RUN --checkpoint best"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from data import DataError
from lm.batches import PaddedRows, ValidationBatches
from lm.config import ConfigError
from lm.decoder import Decoder
from lm.generate import device_argument
from lm.metrics import TokenMetrics
from lm.run import load_decoder, make_data


def validate(decoder: Decoder, loader: DataLoader, metrics: TokenMetrics, precision: str) -> dict[str, float]:
    """Loss and its kin of `decoder` over the batches of `loader`."""
    device = decoder.embedding.weight.device
    low = precision != "32"
    for batch in track(loader, "validating", console=Console(stderr=True), transient=True):
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low):
            nll, correct = decoder(batch["input_ids"], batch["labels"], batch.get("segment_ids"))
        metrics.update(nll, correct, batch["labels"])
    return {name: float(value) for name, value in metrics.compute().items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lm.validate",
        description="Validate a trained run on the validation split of its own data.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, runs/<recipe name>/<run id>")
    parser.add_argument(
        "--checkpoint", default="last", help="which weights: last, best or a step (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=None, help="batches per loader (default: as the recipe says)"
    )
    parser.add_argument(
        "--device",
        type=device_argument,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: %(default)s",
    )
    args = parser.parse_args(arguments)
    if args.batches is not None and args.batches < 1:
        parser.error(f"--batches {args.batches}: expected at least 1")
    try:
        decoder, recipe = load_decoder(args.run, args.device, args.checkpoint)
        data = make_data(recipe)
        data.prepare()
        data.setup()
        trainer = replace(recipe.trainer, val_batches=args.batches or recipe.trainer.val_batches)
        for name, rows in data.val_datasets().items():
            batches = ValidationBatches(len(rows), trainer.batch_size, trainer.val_batches)
            loader = DataLoader(PaddedRows(rows), batch_sampler=batches)
            rates = validate(decoder, loader, TokenMetrics(data.token_bytes), trainer.precision)
            shown = [f"{rate.replace('_', ' ')} {value:.4f}" for rate, value in rates.items()]
            print(f"{name}: {' · '.join(shown)}")
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
