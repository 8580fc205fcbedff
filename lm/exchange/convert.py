"""A published checkpoint of attention, Mamba, Mamba-2 or both as a run folder.

A conversion either uses every tensor and fills every parameter or leaves nothing behind.

Letters: V vocabulary.
"""

import shlex
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mixerlab.data.tokenizers import EOD_TOKENS, JsonTokenizer
from mixerlab.lm.exchange.layouts import read_model
from mixerlab.lm.exchange.published import Published
from mixerlab.lm.exchange.scratch import check_free, written_aside
from mixerlab.lm.exchange.tokenizer_files import pad
from mixerlab.lm.exchange.weight_files import check_size, read_weights, weight_files
from mixerlab.lm.recipe.check import check_recipe, mixers_of
from mixerlab.lm.recipe.load import to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.writer import CheckpointError
from mixerlab.options import ConfigError
from mixerlab.sealed import write_file

LONGEST_ROW, LONG_ROW = 2**24, 8192
"""A longer one stands for no limit; and what most memories do not hold."""


def read_tokenizer(folder: Path, config: Published, vocab_size: int) -> JsonTokenizer | None:
    """The tokenizer of a checkpoint with as many tokens as the model, or None if there is no tokenizer.json."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{path}: not a tokenizer.json of the tokenizers library: {error}") from None
    vocab = tokenizer.get_vocab()
    size = max(vocab.values(), default=-1) + 1
    if size > vocab_size:
        raise ConfigError(f"{path}: {size} tokens; expected at most the {vocab_size} that config.json has")

    # What ends a document: what the tokenizer's settings say, or else the model's, or else the usual names.
    settings = folder / "tokenizer_config.json"
    named = Published.read(settings).values.get("eos_token") if settings.is_file() else None
    candidates = [named.get("content") if isinstance(named, dict) else named]
    ids = config.values.get("eos_token_id")
    added = tokenizer.get_added_tokens_decoder()
    for i in ids if isinstance(ids, list) else [ids]:
        # Also a default of transformers, which may be any token.
        if isinstance(i, int) and i in added and added[i].special:
            candidates.append(added[i].content)
    candidates = [token for token in candidates if isinstance(token, str)]
    eod = next((token for token in (*candidates, *EOD_TOKENS) if token in vocab), None)
    if eod is None:
        raise ConfigError(
            f"{path}: no token ends a document; expected the eos_token of tokenizer_config.json, or "
            f"{' or '.join(EOD_TOKENS)}"
        )
    pad(tokenizer, size, vocab_size)
    padded = JsonTokenizer(tokenizer, eod)
    if padded.vocab_size != vocab_size:
        raise ConfigError(
            f"{path}: its token ids leave gaps, and are {padded.vocab_size}; expected {vocab_size}"
        )
    return padded


def row_length(config: Published) -> int | None:
    """T that the model takes, as far as config.json or the tokenizer's settings tell."""
    settings = config.path.with_name("tokenizer_config.json")
    lengths = [config.values.get("max_position_embeddings")]
    if settings.is_file():
        lengths.append(Published.read(settings).values.get("model_max_length"))
    return next((n for n in lengths if type(n) is int and 1 <= n <= LONGEST_ROW), None)


def make_recipe(
    config: Published, model: dict[str, Any], vocab_size: int, run: Path, tokenizer: JsonTokenizer | None
) -> Recipe:
    """A recipe that trains such a model, on text of this tokenizer."""
    data: dict[str, Any] = {"name": "text"}
    if (length := row_length(config)) is not None:
        data["seq_len"] = length
    if tokenizer is not None:
        file = str(run.resolve() / "tokenizer.json")
        data |= {"tokenizer": "file", "tokenizer_file": file, "eod_token": tokenizer.eod_token}
    elif vocab_size > 257:
        data["vocab_size"] = vocab_size
    else:
        data["tokenizer"] = "bytes"
    raw = {"name": run.resolve().name, "model": model, "data": data, "trainer": {"steps": 1000}}
    try:
        return check_recipe(raw, check_data=False)
    except ConfigError as error:
        raise ConfigError(f"{config.path}: these options do not fit together: {error}") from None


def convert(folder: Path, run: Path) -> str:
    """Writes the run folder `run`; returns what to tell the user. Raises ConfigError, before anything is written."""
    if not folder.is_dir():
        found = "that is a file; expected the folder that holds it" if folder.exists() else "no such folder"
        hub = f"; to download it: hf download {folder} --local-dir {folder.name}"
        raise ConfigError(
            f"{folder}: {found}" + (hub if not folder.exists() and len(folder.parts) == 2 else "")
        )
    check_free(run)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder / 'config.json'}: no such file; expected a checkpoint of transformers or mamba_ssm"
        )
    config = Published.read(folder / "config.json")
    kind, model, vocab_size = read_model(config)
    files = weight_files(folder, config)
    check_size(config, model, vocab_size, files)
    tokenizer = read_tokenizer(folder, config, vocab_size)
    recipe = make_recipe(config, model, vocab_size, run, tokenizer)
    weights, dtypes = read_weights(folder, kind, files, recipe, vocab_size)

    checkpoint = {
        "state_dict": {f"decoder.{name}": tensor for name, tensor in weights.items()},
        "global_step": 0,
        # What Lightning asks for before it trains further; the optimiser starts anew.
        "epoch": 0,
        "pytorch-lightning_version": version("lightning"),
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    with written_aside(run, "convert") as new:
        whole = Run(new)
        whole.checkpoints.folder.mkdir(parents=True)
        # No checksum is noted of it: whoever trains further puts his data in.
        write_file(whole.path / "recipe.yaml", to_yaml(recipe))
        whole.save_environment()
        if tokenizer is not None:
            tokenizer.save(whole.path)
        try:
            save(checkpoint, whole.checkpoints.at(0))
        except (RuntimeError, CheckpointError):
            free = shutil.disk_usage(new).free / 1e9
            raise ConfigError(
                f"--to {run}: it cannot be written: is the disk full? {free:.2f} GB are free there"
            ) from None

    mixers = " and ".join(dict.fromkeys(mixer.name for mixer in mixers_of(recipe)))
    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    stored = "" if dtypes == "float32" else f", {dtypes} stored as float32"
    lines = [
        f"model       {mixers}, {model['n_layers']} layers of width {model['d_model']}, "
        f"{millions:.2f}M parameters{stored}",
        f"run folder  {run}",
    ]
    if (length := recipe.data.options.seq_len) > LONG_ROW:
        lines.append(
            f"note        its rows are {length:,} tokens long; to train it on shorter ones, set data.seq_len"
        )
    if tokenizer is None:
        lines.append(
            f"tokenizer   none, so mixerlab generate cannot be used: {folder} has no tokenizer.json; "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    else:
        lines.append(f"tokenizer   {vocab_size} tokens; {tokenizer.eod_token} ends a document")
        if tokenizer.tokenizer.num_special_tokens_to_add(is_pair=False):
            lines.append(
                "note        this tokenizer adds special tokens to text, and mixerlab generate does not"
            )
        lines.append(f'generate    mixerlab generate {shlex.quote(str(run))} --prompt "..."')
    return "\n".join(lines)
