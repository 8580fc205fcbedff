"""A published Mamba or Mamba-2 checkpoint as a run folder.

Weights are read from safetensors; nothing is unpickled. A conversion either uses every tensor and fills every
parameter or leaves nothing behind.

Letters: V vocabulary.
"""

import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from mixerlab.data.tokenizers import EOD_TOKENS, JsonTokenizer
from mixerlab.lm.exchange.layouts import Published, published_name, read_model
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.check import check_recipe
from mixerlab.lm.recipe.load import to_yaml
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import save
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError
from mixerlab.sealed import sync, write_file


def read_weights(
    folder: Path, files: list[Path], recipe: Recipe, vocab_size: int
) -> tuple[dict[str, Tensor], str]:
    """The decoder's parameters in float32, and what the files had them in."""
    try:
        with torch.device("meta"):  # names and shapes without memory
            decoder = build_decoder(recipe, vocab_size)
    except RuntimeError as error:  # a size that overflows
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'}: such a model cannot be built: {reason}") from None
    shapes = {published_name(name): (name, p.shape) for name, p in decoder.named_parameters()}
    weights: dict[str, Tensor] = {}
    dtypes = set()
    spare_head = None
    for file, name, tensor in _tensors(files):
        # transformers' models without a head lack the prefix, and the original code says embedding.
        full = name if name.startswith(("backbone.", "lm_head.")) else f"backbone.{name}"
        full = full.replace("backbone.embedding.", "backbone.embeddings.")
        if full == "lm_head.weight" and full not in shapes:  # tied, and yet saved: the embedding again
            spare_head = tensor
            continue
        if full not in shapes:
            raise ConfigError(f"{file}: tensor {name} is none of the model that config.json describes")
        ours, shape = shapes[full]
        if ours in weights:
            raise ConfigError(f"{file}: tensor {name} is there twice; expected each once")
        if tensor.shape != shape:
            raise ConfigError(
                f"{file}: tensor {name} has shape {tuple(tensor.shape)}; expected {tuple(shape)} by config.json"
            )
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ConfigError(f"{file}: tensor {name} has dtype {tensor.dtype}; expected bfloat16 or float32")
        dtypes.add(str(tensor.dtype).removeprefix("torch."))
        weights[ours] = tensor.to(torch.float32, copy=True)  # off the file's memory map
    missing = [full for full, (ours, _) in shapes.items() if ours not in weights]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(f"{folder}: no tensor {missing[0]}{more} in the weights, but config.json needs it")
    if spare_head is not None and not torch.equal(spare_head.float(), weights["embedding.weight"]):
        raise ConfigError(
            f"{folder}: lm_head.weight is not the embedding, but config.json ties them; expected "
            "tie_word_embeddings (tie_embeddings of mamba_ssm) to be false"
        )
    return weights, " and ".join(sorted(dtypes))


def _tensors(files: list[Path]) -> Iterator[tuple[Path, str, Tensor]]:
    """(file, name, tensor in the file's memory map) of every tensor."""
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (no mapping)
                    yield file, name, opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{file}: not a whole safetensors file: {error}") from None


def weight_files(folder: Path, config: Published) -> list[Path]:
    """The safetensors files of a checkpoint."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        parts = Published.read(index).section("weight_map").values.values()
        names = sorted({part if isinstance(part, str) else "" for part in parts})
        if not names or not all(name and Path(name).name == name for name in names):
            raise ConfigError(f"{index}: weight_map must name the file, in this folder, of each tensor")
        for name in names:
            if not (folder / name).is_file():
                raise ConfigError(f"{folder / name}: no such file, but {index.name} names it")
        return [folder / name for name in names]
    pickled = sorted(file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        raise ConfigError(f"{folder}: no weights; expected {single.name} or {index.name} and its parts")
    if "model_type" in config.values:
        how = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}).save_pretrained(NEW_FOLDER) of transformers does"
    else:
        how = "safetensors.torch.save_model(MambaLMHeadModel.from_pretrained(...), 'model.safetensors') does"
    raise ConfigError(
        f"{folder / pickled[0]}: pickled weights can run code and are not read; save as safetensors: {how}"
    )


def _check_size(config: Published, model: dict[str, Any], vocab_size: int, files: list[Path]) -> None:
    """Refuses a model far larger than its weights before anything of that size is made."""
    width = model["d_model"]
    least = vocab_size * width + model["n_layers"] * width * width  # the embedding, and part of each in_proj
    stored = sum(tensor.numel() for _, _, tensor in _tensors(files))
    if least > stored:
        raise ConfigError(
            f"{config.path}: it describes a model of over {least:,} parameters, and the weights have {stored:,}"
        )


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
    # An embedding is often padded to a round size. With a special token for each row of padding, whatever the
    # model says is decoded, and training further finds a vocabulary of the same size.
    tokenizer.add_special_tokens([f"<|unused {i}|>" for i in range(size, vocab_size)])
    padded = JsonTokenizer(tokenizer, eod)
    if padded.vocab_size != vocab_size:
        raise ConfigError(
            f"{path}: its token ids leave gaps, and are {padded.vocab_size}; expected {vocab_size}"
        )
    return padded


def make_recipe(
    config: Published, model: dict[str, Any], vocab_size: int, run: Path, tokenizer: JsonTokenizer | None
) -> Recipe:
    """A recipe that trains such a model, on text of this tokenizer."""
    data: dict[str, Any] = {"name": "text"}
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


@contextmanager
def _scratch(run: Path) -> Iterator[Path]:
    """An empty folder to make `run` in, which goes in the end; what a killed conversion to it left goes first."""
    scratch = run.resolve().with_name(f".convert-{run.resolve().name}")
    scratch.mkdir(exist_ok=True)
    try:
        with FileLock(scratch / ".lock", timeout=0):
            shutil.rmtree(scratch / "run", ignore_errors=True)
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except Timeout:
        raise ConfigError(f"--to {run}: another process is converting to that folder") from None


def convert(folder: Path, run: Path) -> str:
    """Writes the run folder `run`; returns what to tell the user. Raises ConfigError, before anything is written."""
    if not folder.is_dir():
        found = "that is a file; expected the folder that holds it" if folder.exists() else "no such folder"
        hub = f"; to download it: hf download {folder} --local-dir {folder.name}"
        raise ConfigError(
            f"{folder}: {found}" + (hub if not folder.exists() and len(folder.parts) == 2 else "")
        )
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise ConfigError(f"--to {run}: it exists already; expected a new or an empty folder")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder / 'config.json'}: no such file; expected a checkpoint of transformers or mamba_ssm"
        )
    config = Published.read(folder / "config.json")
    model, vocab_size = read_model(config)
    files = weight_files(folder, config)
    _check_size(config, model, vocab_size, files)
    tokenizer = read_tokenizer(folder, config, vocab_size)
    recipe = make_recipe(config, model, vocab_size, run, tokenizer)
    weights, dtypes = read_weights(folder, files, recipe, vocab_size)

    checkpoint = {
        "state_dict": {f"decoder.{name}": tensor for name, tensor in weights.items()},
        "global_step": 0,
        # What Lightning asks for before it trains further; the optimiser starts anew.
        "epoch": 0,
        "pytorch-lightning_version": version("lightning"),
        "optimizer_states": [],
        "lr_schedulers": [],
    }
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(run) as scratch:
            whole = Run(scratch / "run")
            whole.checkpoints.folder.mkdir(parents=True)
            # No checksum is noted of it: whoever trains further puts his data in.
            write_file(whole.path / "recipe.yaml", to_yaml(recipe))
            whole.save_environment()
            if tokenizer is not None:
                tokenizer.save(whole.path)
            save(checkpoint, whole.checkpoints.at(0))
            whole.path.rename(run)
            sync(run.parent)
    except (OSError, RuntimeError) as error:  # torch raises the latter where the disk is full
        raise ConfigError(f"--to {run}: it cannot be written: {str(error).splitlines()[0]}") from None

    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    stored = "" if dtypes == "float32" else f", {dtypes} stored as float32"
    lines = [
        f"model       {model['mixer']['name']}, {model['n_layers']} layers of width {model['d_model']}, "
        f"{millions:.2f}M parameters{stored}",
        f"run folder  {run}",
    ]
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
