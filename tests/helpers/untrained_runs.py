"""Run folders as training leaves them, of decoders in which every parameter is random and matters."""

import torch

from mixerlab.data.tokenizers import ByteTokenizer, TextTokenizer, train_bpe
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.check import check_recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.options import plain

TEXTS = ["the cat sat on the mat\n" * 9, "def f(x):\n    return x + 1\n" * 9]
ATTENTION = {"name": "attention", "n_heads": 4, "n_kv_heads": 2}
MAMBA = {"name": "mamba", "d_state": 4}
MAMBA2 = {"name": "mamba2", "d_state": 8, "head_dim": 8, "n_groups": 2}
TRANSFORMER = {"block": "transformer", "norm": "rmsnorm", "d_model": 24, "n_layers": 2}
STEP = 3


def untrained(folder, model, tokenizer="bytes", change=None, rows=None, **sections):
    """The Run in a new folder.

    Args:
        model: changes of TRANSFORMER, the section of the recipe.
        tokenizer: "bytes", "bpe" or None.
        change: called with the decoder before it is saved.
        rows: of the embedding, where they are not the tokenizer's.
        sections: the other sections of the recipe.
    """
    raw = {"name": "untrained", "model": {**TRANSFORMER, **model}, "trainer": {"steps": STEP}}
    recipe = check_recipe(raw | {"data": {"name": "text", "seq_len": 64}} | sections, check_data=False)
    run = Run(folder)
    run.checkpoints.folder.mkdir(parents=True)
    run.save_recipe(recipe)
    saved: TextTokenizer | None = None
    if tokenizer is not None:
        saved = ByteTokenizer() if tokenizer == "bytes" else train_bpe(TEXTS, 280)
    if saved is not None:
        saved.save(run.path)
    decoder = build_decoder(recipe, rows or (259 if saved is None else saved.vocab_size))
    decoder.initialize(0)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.2)
        if change is not None:
            change(decoder)
    weights = {f"decoder.{name}": value for name, value in decoder.state_dict().items()}
    state = {"global_step": STEP, "state_dict": weights, "recipe": plain(recipe)}
    save({**state, "valid_loss": 2.5, "metrics": {"valid/loss": 2.5}}, run.checkpoints.at(STEP))
    return run
