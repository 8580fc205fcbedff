"""The optimiser step and the callbacks around it, without a trainer."""

from types import SimpleNamespace
from typing import Any

import torch

from mixerlab.lm.model.precision import precision_plugin
from mixerlab.lm.parallel.sharding import make_decoder
from mixerlab.lm.training.module import LanguageModel


def fake_trainer(step=0, max_steps=10, precision="32", **more):
    """As much of Lightning's trainer as a step, a callback or a logger looks at."""
    strategy = SimpleNamespace(model=None, lightning_module=None, root_device=torch.device("cpu"))
    return SimpleNamespace(
        global_step=step,
        max_steps=max_steps,
        strategy=strategy,
        precision_plugin=precision_plugin(precision, "cpu"),
        loggers=[],
        is_global_zero=True,
        world_size=1,
        should_stop=False,
        checkpoint_callback=None,
        **more,
    )


def attached(recipe, vocab_size=257, double=True, step=0, **options):
    """A module that can take a step; its decoder is in float64 unless said otherwise."""
    decoder = make_decoder(recipe, vocab_size)
    module: Any = LanguageModel(recipe, decoder.double() if double else decoder, total_steps=20, **options)
    optimizer = module.configure_optimizers()
    module.optimizers = lambda: optimizer
    module.manual_backward = lambda loss: loss.backward()
    module.trainer = fake_trainer(step, precision=recipe.trainer.precision)
    return module.train()


def gradients(module):
    """name -> gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in module.decoder.named_parameters() if p.grad is not None}


def micro_batches(*label_counts, time=9, vocab_size=257, seed=0):
    """A micro-batch for each tuple of label counts, which has a row for each count."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for counts in label_counts:
        ids = torch.randint(vocab_size, (len(counts), time + 1), generator=generator)
        labels = ids[:, 1:].clone()
        for row, count in enumerate(counts):
            labels[row, count:] = -100
        made.append({"input_ids": ids[:, :-1], "labels": labels})
    return made
