"""A published Mamba or Mamba-2 checkpoint as a run folder: python -m lm.convert FOLDER --to RUN

Read are folders of transformers (`MambaForCausalLM`, `Mamba2ForCausalLM`) and of the original `mamba_ssm` code, with
weights in safetensors. Nothing is unpickled. What this code cannot represent is refused, and a conversion either
uses every tensor and fills every parameter or leaves nothing behind.

Letters: D model width, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor

from data.tokenizers import EOD_TOKENS, JsonTokenizer
from lm.checkpoint import folder_of, save
from lm.config import ConfigError, Recipe, check_recipe
from lm.run import build_decoder, environment, save_recipe

DESCRIPTION = """\
Turn a published Mamba or Mamba-2 checkpoint into a run folder.

FOLDER holds config.json, the weights as model.safetensors (or model.safetensors.index.json and its parts) and, for
text, tokenizer.json: what `hf download OWNER/NAME --local-dir FOLDER` leaves, or transformers' save_pretrained."""

EXAMPLES = """
examples:
  hf download state-spaces/mamba-130m-hf --local-dir mamba-130m
  python -m lm.convert mamba-130m --to runs/mamba-130m/published
  python -m lm.generate runs/mamba-130m/published --prompt "The capital of France is"
  python train.py runs/mamba-130m/published/recipe.yaml resume=runs/mamba-130m/published

The last one trains the weights further, in that run folder, by what its recipe.yaml says; put your data there first.
"""

BLOCK_EPS = 1e-5
"""Of the decoder's norms."""


class Config:
    """A mapping from a JSON file, whose values are asked for by name. What is wrong raises ConfigError."""

    def __init__(self, path: Path, values: dict[str, Any], prefix: str = ""):
        self.path, self.values, self.prefix = path, values, prefix

    def problem(self, key: str, expected: str) -> ConfigError:
        found = f"= {self.values[key]!r}" if key in self.values else "is missing"
        return ConfigError(f"{self.path}: {self.prefix}{key} {found}; expected {expected}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if type(value) is not int or not 1 <= value < 2**31:
            raise self.problem(key, "an integer of at least 1 and below 2^31")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.problem(key, "true or false")
        return value

    def only(self, key: str, supported: Any, why: str = "") -> None:
        """Refuses a value, where there is one, other than the one that this code has."""
        if key in self.values and self.values[key] != supported:
            raise self.problem(key, f"{json.dumps(supported)}{why and ', ' + why}")

    def section(self, key: str) -> Config:
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise self.problem(key, "a mapping")
        return Config(self.path, value, f"{self.prefix}{key}.")

    def step_limits(self, key: str) -> list[float]:
        """Bounds of the step size. Infinity is a tagged mapping in newer files of transformers."""
        value = self.values.get(key, [0.0, math.inf])
        try:
            low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
        except (TypeError, ValueError, KeyError, OverflowError):
            raise self.problem(key, "two numbers") from None
        if not 0 <= low < high:
            raise self.problem(key, "two numbers, 0 <= the first < the second")
        return [low, high]


def read_model(config: Config) -> tuple[dict[str, Any], int]:
    """config.json -> (the `model` section of a recipe, V)."""
    kind = config.values.get("model_type")
    config.only("quantization_config", None, "since quantised weights are not read")
    if kind in ("mamba", "mamba2"):
        model, vocab_size = _transformers_model(config)
    elif kind is None and {"d_model", "n_layer"} <= config.values.keys():
        model, vocab_size = _original_model(config)
    else:
        raise config.problem("model_type", "mamba or mamba2 (or the d_model and n_layer of mamba_ssm)")
    return {"block": "transformer", "mlp": "none", "norm": "rmsnorm", **model}, vocab_size


def _transformers_model(config: Config) -> tuple[dict[str, Any], int]:
    """Defaults are those of transformers' MambaConfig and Mamba2Config."""
    second = config.values["model_type"] == "mamba2"
    width, expand = config.integer("hidden_size"), config.integer("expand", 2)
    config.only("hidden_act", "silu")
    config.only("rms_norm", True)
    config.only("layer_norm_epsilon", BLOCK_EPS, "the epsilon of the decoder's norms")
    config.only("intermediate_size", expand * width, "expand * hidden_size")
    mixer: dict[str, Any] = {
        "name": "mamba2" if second else "mamba",
        "expand": expand,
        "d_state": config.integer("state_size", 128 if second else 16),
        "d_conv": config.integer("conv_kernel", 4),
        "conv_bias": config.flag("use_conv_bias", True),
        "bias": config.flag("use_bias", False),
    }
    if second:
        head_width, heads = config.integer("head_dim", 64), config.integer("num_heads", 128)
        if heads * head_width != expand * width:
            raise config.problem(
                "num_heads", f"expand * hidden_size / head_dim = {expand * width / head_width:g}"
            )
        mixer["head_width"] = head_width
        mixer["n_groups"] = config.integer("n_groups", 8)
        mixer["dt_limit"] = config.step_limits("time_step_limit")
        mixer["norm_eps"] = BLOCK_EPS
    elif config.values.get("time_step_rank", "auto") != "auto":
        mixer["dt_rank"] = config.integer("time_step_rank")
    model = {
        "d_model": width,
        "n_layers": config.integer("num_hidden_layers"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_word_embeddings", not second),
    }
    return model, config.integer("vocab_size")


INITIAL = {
    *("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init"),
    *("chunk_size", "use_fast_path", "use_mem_eff_path", "device", "dtype"),
}
"""Keys of `ssm_cfg` that decide initial values and speed, and nothing of a trained model."""


def _original_model(config: Config) -> tuple[dict[str, Any], int]:
    """Defaults are those of `mamba_ssm`: models/config_mamba.py, modules/mamba_simple.py and modules/mamba2.py."""
    config.only("rms_norm", True)
    config.only("attn_layer_idx", [])
    config.only("d_intermediate", 0)
    ssm = config.section("ssm_cfg")
    layer = ssm.values.get("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise ssm.problem("layer", "Mamba1 or Mamba2")
    second = layer == "Mamba2"
    mixer: dict[str, Any] = {
        "name": "mamba2" if second else "mamba",
        "expand": ssm.integer("expand", 2),
        "d_state": ssm.integer("d_state", 128 if second else 16),
        "d_conv": ssm.integer("d_conv", 4),
        "conv_bias": ssm.flag("conv_bias", True),
        "bias": ssm.flag("bias", False),
    }
    read = {"layer", "expand", "d_state", "d_conv", "conv_bias", "bias"}
    if second:
        mixer["head_width"] = ssm.integer("headdim", 64)
        mixer["n_groups"] = ssm.integer("ngroups", 1)
        mixer["dt_limit"] = ssm.step_limits("dt_limit")
        mixer["norm_eps"] = 1e-5
        for key, supported in {
            "d_ssm": None,
            "D_has_hdim": False,
            "rmsnorm": True,
            "norm_before_gate": False,
        }.items():
            ssm.only(key, supported)
            read.add(key)
        read |= {"headdim", "ngroups", "dt_limit"}
    else:
        if ssm.values.get("dt_rank", "auto") != "auto":
            mixer["dt_rank"] = ssm.integer("dt_rank")
        read.add("dt_rank")
    if unknown := sorted(ssm.values.keys() - read - INITIAL):
        raise ssm.problem(unknown[0], f"none, since {layer} here has no such option")
    model = {
        "d_model": config.integer("d_model"),
        "n_layers": config.integer("n_layer"),
        "mixer": mixer,
        "tie_embeddings": config.flag("tie_embeddings", True),
    }
    multiple = config.integer("pad_vocab_size_multiple", 8)
    return model, math.ceil(config.integer("vocab_size") / multiple) * multiple


def published_name(name: str) -> str:
    """A parameter of the decoder -> its name in the files."""
    if name.startswith("blocks."):
        return "backbone.layers." + name.removeprefix("blocks.")
    names = {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"}
    module, _, parameter = name.rpartition(".")
    return f"{names[module]}.{parameter}"


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


def weight_files(folder: Path, config: Config) -> list[Path]:
    """The safetensors files of a checkpoint."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        parts = Config(index, _read_json(index)).section("weight_map").values.values()
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


def _check_size(config: Config, model: dict[str, Any], vocab_size: int, files: list[Path]) -> None:
    """Refuses a model far larger than its weights before anything of that size is made."""
    width = model["d_model"]
    least = vocab_size * width + model["n_layers"] * width * width  # the embedding, and part of each in_proj
    stored = sum(tensor.numel() for _, _, tensor in _tensors(files))
    if least > stored:
        raise ConfigError(
            f"{config.path}: it describes a model of over {least:,} parameters, and the weights have {stored:,}"
        )


def read_tokenizer(folder: Path, config: Config, vocab_size: int) -> JsonTokenizer | None:
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
    named = _read_json(settings).get("eos_token") if settings.is_file() else None
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
    config: Config, model: dict[str, Any], vocab_size: int, run: Path, tokenizer: JsonTokenizer | None
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
    config = Config(folder / "config.json", _read_json(folder / "config.json"))
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
        with tempfile.TemporaryDirectory(prefix=".convert-", dir=run.parent) as scratch:
            whole = Path(scratch) / "run"
            (whole / "checkpoints").mkdir(parents=True)
            save_recipe(whole, recipe)
            (whole / "environment.json").write_text(
                json.dumps(environment(), indent=2) + "\n", encoding="utf-8"
            )
            if tokenizer is not None:
                tokenizer.save(whole)
            save(checkpoint, folder_of(whole, 0))
            whole.rename(run)
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
            f"tokenizer   none, so python -m lm.generate cannot be used: {folder} has no tokenizer.json; "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    else:
        lines.append(f"tokenizer   {vocab_size} tokens; {tokenizer.eod_token} ends a document")
        if tokenizer.tokenizer.num_special_tokens_to_add(is_pair=False):
            lines.append(
                "note        this tokenizer adds special tokens to text, and python -m lm.generate does not"
            )
        lines.append(f'generate    python -m lm.generate {shlex.quote(str(run))} --prompt "..."')
    return "\n".join(lines)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # not JSON, not UTF-8, or not readable
        raise ConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: {type(values).__name__} in JSON; expected a mapping")
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lm.convert",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the published checkpoint")
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="RUN",
        help="the run folder to write, new or empty, such as runs/mamba-130m/published",
    )
    args = parser.parse_args(arguments)
    try:
        print(convert(args.folder, args.to))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
