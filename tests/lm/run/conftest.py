"""Run folders made without training."""

import pytest

from mixerlab.data.tokenizers import ByteTokenizer
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.options import plain
from tiny_runs import TINY


@pytest.fixture
def recipe(options):
    """The tiny recipe, with changes."""

    def load(*overrides):
        return load_recipe(TINY, [*options, *overrides])

    return load


@pytest.fixture
def make_run(recipe):
    """A run as if trained for some steps: a folder with a checkpoint."""

    def make(*overrides, step=5, **notes):
        made = recipe(*overrides)
        run = Run.create(made)
        tokenizer = ByteTokenizer()
        tokenizer.save(run.path)
        decoder = build_decoder(made, tokenizer.vocab_size)
        decoder.initialize(made.seed)
        weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
        state = {
            "global_step": step,
            "state_dict": weights,
            "recipe": plain(made),
            "rows_per_step": 4,
            **notes,
        }
        save(state, run.checkpoints.at(step))
        return run

    return make
