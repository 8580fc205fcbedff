"""Validating a run after it was trained."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from mixerlab.data import build_data
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.run.folder import Run
from mixerlab.lm.training.batches import Loaders
from mixerlab.lm.training.metrics import TokenMetrics
from mixerlab.options import ConfigError


def validate_run(
    run: Run, checkpoint: str = "last", device: str = "cpu", batches: int | None = None
) -> Iterator[tuple[str, dict[str, float]]]:
    """(loader, its rates) of the run's own data; `batches` of each loader, or as many as the recipe says."""
    recipe, decoder = run.recipe, run.decoder(checkpoint, device)
    data = build_data(recipe.data, recipe.seed)
    data.prepare()
    data.setup()
    if data.vocab_size > (rows := decoder.embedding.weight.shape[0]):
        raise ConfigError(
            f"run folder {run.path}: its data have {data.vocab_size} tokens now, and its decoder {rows}; restore the "
            "data that it was trained on"
        )
    token_bytes = None if data.token_bytes is None else data.token_bytes.to(device)
    trainer = replace(recipe.trainer, val_batches=batches or recipe.trainer.val_batches)
    loaders = Loaders(data, trainer, recipe.seed, 0, World()).val_dataloader()
    for name, loader in zip(data.val_datasets(), loaders, strict=True):
        yield name, validate(decoder, loader, TokenMetrics(token_bytes), trainer.precision)


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
