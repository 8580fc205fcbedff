"""The weights of a published checkpoint: its safetensors files, and what the decoder takes from them.

Weights are read from safetensors; nothing is unpickled. Either every tensor is used and every parameter filled, or it
is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mixerlab.lm.exchange.names import is_rotated, published_names, stem, to_pairs
from mixerlab.lm.exchange.published import Published
from mixerlab.lm.model.decoder import build_decoder
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.mixers.attention import Attention
from mixerlab.options import ConfigError


def read_weights(
    folder: Path, kind: str, files: list[Path], recipe: Recipe, vocab_size: int
) -> tuple[dict[str, Tensor], str]:
    """The decoder's parameters in float32, and what the files, which are of a `model_type`, had them in."""
    try:
        with torch.device("meta"):  # names and shapes without memory
            decoder = build_decoder(recipe, vocab_size)
    except RuntimeError as error:  # a size that overflows
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{folder / 'config.json'}: such a model cannot be built: {reason}") from None
    parameters = dict(decoder.named_parameters())
    shapes = {
        full: (name, parameters[name].shape) for name, full in published_names(kind, parameters).items()
    }
    heads = {(m.head_dim, m.rope_dim) for m in (b.mixer for b in decoder.layers) if isinstance(m, Attention)}
    prefix = f"{stem(kind)}."
    weights: dict[str, Tensor] = {}
    dtypes = set()
    spare_head = None
    for file, name, tensor in _tensors(files):
        if name.endswith(".rotary_emb.inv_freq"):  # of older files: frequencies, which follow from the base
            continue
        # transformers' models without a head lack the prefix, and the original code of Mamba says embedding.
        full = name if name.startswith((prefix, "lm_head.")) else prefix + name
        full = full.replace("backbone.embedding.", "backbone.embeddings.")
        if full == "lm_head.weight" and full not in shapes:  # tied, and yet saved: the embedding again
            spare_head = tensor
            continue
        if kind == "llama" and full.endswith(".o_proj.bias"):  # which a run never has
            if tensor.any():
                raise ConfigError(
                    f"{file}: tensor {name} is not zero; expected zeros: attention here has no such bias"
                )
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
        if is_rotated(ours):
            ((head_dim, rope_dim),) = heads
            weights[ours] = to_pairs(weights[ours], head_dim, rope_dim)
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


def check_size(config: Published, model: dict[str, Any], vocab_size: int, files: list[Path]) -> None:
    """Refuses a model far larger than its weights before anything of that size is made."""
    width = model["d_model"]
    # The embedding, and of each layer the MLP, or part of in_proj.
    least = vocab_size * width + model["n_layers"] * width * (3 * model.get("mlp_dim", 0) or width)
    stored = sum(tensor.numel() for _, _, tensor in _tensors(files))
    if least > stored:
        raise ConfigError(
            f"{config.path}: it describes a model of over {least:,} parameters, and the weights have {stored:,}"
        )
