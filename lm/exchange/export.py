"""A run's weights and tokenizer as a folder of transformers, read back and compared before it has its name.

Letters: B batch, T time, V vocabulary.
"""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from mixerlab.data import DataError, TextTokenizer
from mixerlab.lm.exchange.card import model_card
from mixerlab.lm.exchange.native import CHUNK, NotNative, native_configs, native_weights
from mixerlab.lm.exchange.scratch import check_free, written_aside
from mixerlab.lm.exchange.tokenizer_files import HARD_TEXT, adds_tokens, write_tokenizer
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.recipe.check import with_auto_backends
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import step_of
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.weights import check_tokens
from mixerlab.options import ConfigError, first_line, plain

CODE = Path(__file__).with_name("modeling_mixerlab.py")
CLOSE, CLOSE_TOKENS = 1e-5, 1e-4
"""Of the size of the logits: how far they may be from ours, and those of generated tokens from the largest."""
PROMPT, NEW_TOKENS = 14, 50
MOST_POSITIONS = 1024
"""That are compared, whatever the window."""


def export(
    run: Run, to: Path, form: str = "auto", checkpoint: str = "last", max_shard_size: str = "5GB"
) -> str:
    """Writes the folder `to`; returns what to tell the user.

    `form` is "native" (an architecture of transformers), "remote" (a modeling file that imports mixerlab) or "auto",
    the first that can be. Raises ConfigError, which names the option that prevents it; then nothing is written.
    """
    check_free(to)
    import_transformers()
    step = step_of(
        run.checkpoints.named(checkpoint)
    )  # asked for once: a run that trains writes others meanwhile
    decoder = run.decoder(str(step)).float()
    tokenizer = run.tokenizer() if run.has_tokenizer else None
    rows = decoder.embedding.num_embeddings
    if tokenizer is not None:
        check_tokens(run.path, tokenizer, decoder)
    seq_len = getattr(run.recipe.data.options, "seq_len", 2048)

    def write(config: dict[str, Any], weights: dict[str, Tensor]) -> str:
        kind = config["model_type"]
        eod = None if tokenizer is None else tokenizer.eod_id
        config = {**config, **dict.fromkeys(("bos_token_id", "eos_token_id"), eod)}
        with written_aside(to, "export") as folder:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            save_torch_state_dict(weights, folder, max_shard_size=max_shard_size)
            if kind == "mixerlab":
                (folder / CODE.name).write_bytes(CODE.read_bytes())
            if tokenizer is not None:
                write_tokenizer(tokenizer, rows, seq_len, folder)
            parameters = sum(weight.numel() for weight in weights.values())
            (folder / "README.md").write_text(model_card(run, step, kind, parameters), encoding="utf-8")
            error = compare(folder, decoder, kind)
            if tokenizer is not None:
                compare_tokens(folder, tokenizer, kind)
            files = len(list(folder.glob("*.safetensors")))
        lines = [
            f"weights     {parameters / 1e6:.2f}M parameters in float32, in {files} file{'s' * (files > 1)}",
            f"compared    logits within {error:.1e} of their size; greedy generation is the same"
            + ("" if tokenizer is None else ", and so are tokens"),
        ]
        if tokenizer is not None and adds_tokens(tokenizer):
            lines.append(
                "note        the special tokens that this tokenizer adds to text are left out, as in training"
            )
        if run.recipe.model.dropout and kind != "mixerlab":
            lines.append("note        model.dropout is left out: transformers has none in these places")
        lines.append(
            f"load        AutoModelForCausalLM.from_pretrained({str(to)!r}"
            + (", trust_remote_code=True)" if kind == "mixerlab" else ")")
        )
        return "\n".join(lines)

    why = ""
    if form != "remote":
        unfit: NotNative | None = None
        try:
            configs = native_configs(run.recipe, rows, seq_len)
        except NotNative as error:
            configs, unfit = [], error
        for config in configs:
            try:
                said = write(config, native_weights(config, decoder))
                return f"format      native: {config['architectures'][0]} of transformers\n{said}"
            except NotNative as error:
                unfit = unfit or error
        assert unfit is not None
        if form == "native":
            raise unfit
        why = f"\nnot native  {str(unfit).partition(';')[0]}"
    weights = {f"decoder.{name}": tensor for name, tensor in decoder.state_dict().items()}
    said = write(remote_config(run.recipe, rows, seq_len), weights)
    return f"format      remote: {CODE.name}, which needs mixerlab where it is used{why}\n{said}"


def import_transformers() -> Any:
    """The package, told to be quiet. Raises ConfigError where it is not installed."""
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            f"mixerlab export: {first_line(error)}; expected it installed: pip install 'mixerlab[transformers]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def remote_config(recipe: Recipe, vocab_size: int, seq_len: int) -> dict[str, Any]:
    """What config.json says of a decoder that the modeling file builds, but for tokens."""
    model = plain(with_auto_backends(recipe).model)
    model = {key: value for key, value in model.items() if not key.startswith("match")}
    return {
        "architectures": ["MixerlabForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{CODE.stem}.MixerlabConfig",
            "AutoModelForCausalLM": f"{CODE.stem}.MixerlabForCausalLM",
        },
        "model_type": "mixerlab",
        "dtype": "float32",
        "vocab_size": vocab_size,
        "max_position_embeddings": seq_len,
        "plugins": recipe.plugins,
        "model": _without_infinity(model),
    }


def _without_infinity(value: Any) -> Any:
    """As transformers writes it, since JSON has none."""
    if isinstance(value, dict):
        return {key: _without_infinity(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_infinity(item) for item in value]
    return {"__float__": "Infinity"} if value == math.inf else value


@torch.no_grad()
def compare(folder: Path, decoder: Decoder, kind: str) -> float:
    """How far the logits of what transformers reads are from the decoder's, as a share of their size.

    Raises ConfigError where it reads other weights, logits, or generates tokens that are not the likeliest.
    """
    try:
        model, report = import_transformers().AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=torch.float32, trust_remote_code=kind == "mixerlab", output_loading_info=True
        )
    except OSError as failure:  # which it raises for much else too
        raise ConfigError(
            f"model_type = {kind!r}: transformers cannot read back what was written: {first_line(failure)}"
        ) from None
    if problems := {what: names for what, names in report.items() if names}:
        raise ConfigError(
            f"model_type = {kind!r}: transformers does not read back the weights that were written: {problems}"
        )
    model.eval()
    rows, window = decoder.embedding.num_embeddings, getattr(model.config, "sliding_window", None) or 0
    # Beyond a window, and beyond the positions that transformers takes at a time through Mamba-2.
    shape = (2, min(max(window, CHUNK) + 40, MOST_POSITIONS))  # (B, T)
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = decoder(ids), model(ids, use_cache=False).logits  # (B, T, V)
    if not ours.isfinite().all():
        raise ConfigError(
            "the run's logits are not finite, so there is nothing to compare; expected other weights"
        )
    error = float((ours - theirs).norm() / ours.norm().clamp(min=1e-30))
    if not error <= CLOSE:
        raise NotNative(
            f"model_type = {kind!r}: the logits of what was written differ by {error:.1e} of their size in "
            f"transformers, and {CLOSE:g} is allowed"
        )
    prompt = ids[:1, :PROMPT]
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=rows,  # no token: the end of a document does not end it
    )
    ours = decoder(text)[0, PROMPT - 1 : -1]  # (T, V)
    chosen = ours.gather(-1, text[0, PROMPT:, None])[:, 0]  # (T,)
    # Of two that are equally likely rounding chooses.
    if (ours.amax(-1) - chosen).max() > CLOSE_TOKENS * ours.abs().max():
        raise ConfigError(f"model_type = {kind!r}: transformers generates other tokens from what was written")
    return error


def compare_tokens(folder: Path, tokenizer: TextTokenizer, kind: str) -> None:
    """Raises ConfigError where transformers makes other tokens of a text than the run's tokenizer does."""
    theirs = import_transformers().AutoTokenizer.from_pretrained(
        str(folder), trust_remote_code=kind == "mixerlab"
    )
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randint(tokenizer.vocab_size, (200,), generator=draw).tolist()
    for text in (HARD_TEXT, tokenizer.decode(drawn)):
        try:
            ids = tokenizer.encode(text)
        except DataError:  # it does not cover such a text
            continue
        if theirs(text)["input_ids"] != ids or theirs.eos_token_id != tokenizer.eod_id:
            if kind == "mixerlab":
                raise ConfigError(
                    f"model_type = {kind!r}: transformers makes other tokens of a text than the run's tokenizer"
                )
            raise NotNative(
                f"model.mixer.bias makes it model_type {kind!r}, for which transformers replaces the run's tokenizer"
                if kind == "qwen2"
                else f"model_type = {kind!r}: transformers replaces the run's tokenizer"
            )
