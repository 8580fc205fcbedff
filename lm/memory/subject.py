"""What is looked at: a trained run on its validation text, a recipe at its initial values, or either on a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixerlab.data import DataModule, TextTokenizer, build_data
from mixerlab.lm.model.decoder import Decoder, build_decoder
from mixerlab.lm.model.match import sized
from mixerlab.lm.recipe.check import mixers_of
from mixerlab.lm.recipe.files import SHIPPED, find_recipe
from mixerlab.lm.recipe.load import load_recipe
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.folder import Run
from mixerlab.options import ConfigError


@dataclass(frozen=True)
class Subject:
    """Decoders of one kind, and the tokens that they are looked at with."""

    label: str
    about: str
    tokens: Tensor  # (n, T) int64
    words: list[str] | None
    """The text of each token of the first sequence; None where tokens are not text."""
    run: Run | None
    recipe: Recipe
    checkpoint: str = "last"
    device: str = "cpu"
    seeds: int = 1

    def decoders(self) -> Iterator[Decoder]:
        """The trained one, or one for each seed at its initial values; in float32 and evaluation mode."""
        if self.run is not None:
            yield self.run.decoder(self.checkpoint, self.device).float()
            return
        vocab_size = build_data(self.recipe.data, self.recipe.seed).vocab_size
        for seed in range(self.recipe.seed, self.recipe.seed + self.seeds):
            decoder = build_decoder(self.recipe, vocab_size)
            decoder.initialize(seed)
            yield decoder.to(self.device).eval()


def run_subject(
    run: Run,
    *,
    text: str | None = None,
    length: int | None = None,
    sequences: int = 4,
    checkpoint: str = "last",
    device: str = "cpu",
) -> Subject:
    """A trained run, on rows of its validation split or on a text. Raises ConfigError."""
    recipe = run.recipe
    tokenizer: TextTokenizer | None
    if text is not None:
        tokenizer = run.tokenizer()
        tokens, about = _of_text(tokenizer, text, length, sequences, recipe), "a text given"
    else:
        data = build_data(recipe.data, recipe.seed)
        data.prepare()
        data.setup()
        tokens, about = _validation(data, length, sequences)
        tokenizer = data.tokenizer
    rows = run.decoder(checkpoint).embedding.weight.shape[0]
    if int(tokens.max()) >= rows:
        raise ConfigError(
            f"run folder {run.path}: its data have token {int(tokens.max())} now, and its decoder {rows} tokens; "
            "restore the data that it was trained on"
        )
    label = f"{run.path.parent.name}/{run.path.name}"
    return Subject(label, about, tokens, _words(tokenizer, tokens), run, recipe, checkpoint, device)


def recipe_subject(
    recipe: Recipe,
    *,
    text: str | None = None,
    length: int | None = None,
    sequences: int = 4,
    seeds: int = 3,
    device: str = "cpu",
) -> Subject:
    """A recipe at its initial values, on random tokens, for which no data are needed, or on a text."""
    recipe = sized(recipe)
    data = build_data(recipe.data, recipe.seed)
    tokenizer = None
    if text is not None:
        data.prepare()
        data.setup()
        tokenizer = data.tokenizer
        if tokenizer is None:
            raise ConfigError(f"--text: the data {recipe.data.name!r} have no tokenizer; leave it out")
        tokens = _of_text(tokenizer, text, length, sequences, recipe)
    else:
        shape = (sequences, length or data.seq_len)
        tokens = torch.randint(data.vocab_size, shape, generator=torch.Generator().manual_seed(recipe.seed))
    about = "random tokens" if text is None else "a text given"
    label = f"{recipe.name} {', '.join(choice.name for choice in mixers_of(recipe))}"
    words = _words(tokenizer, tokens)
    return Subject(label, about, tokens, words, None, recipe, device=device, seeds=seeds)


def subject(name: str, overrides: Sequence[str], allow_plugins: bool, **options) -> Subject:
    """The run in a folder, or the recipe of that name. `options` are those of both functions above."""
    if Path(name).is_dir():
        if overrides:
            raise ConfigError(
                f"{overrides[0]}: {name} is a run, trained as its recipe says; overrides and --mixers are for recipes"
            )
        options.pop("seeds")
        return run_subject(Run.open(name, allow_plugins), **options)
    try:
        find_recipe(name)
    except ConfigError:
        recipes = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
        raise ConfigError(
            f"{name}: no such run folder or recipe; expected runs/<recipe name>/<run>, a YAML file, or one of {recipes}"
        ) from None
    options.pop("checkpoint")
    return recipe_subject(load_recipe(name, overrides, allow_plugins=allow_plugins), **options)


def _validation(data: DataModule, length: int | None, sequences: int) -> tuple[Tensor, str]:
    """(n, T) tokens of the validation rows, where possible of rows that lie within one document."""
    dataset = next(iter(data.val_datasets().values()))
    rows = (dataset[i] for i in range(len(dataset)))
    length = length or data.seq_len
    needed = sequences * length
    whole: list[Tensor] = []
    mixed: list[Tensor] = []
    for row in rows:
        ids = row.get("segment_ids")
        (whole if ids is None or bool((ids == ids[0]).all()) else mixed).append(row["input_ids"])
        if sum(map(len, whole)) >= needed:
            break
    tokens = torch.cat([*whole, *mixed])[:needed]
    length = min(length, len(tokens))
    about = "its validation text"
    if sum(map(len, whole)) < needed:
        about += ", in which documents that share a row see each other"
    return tokens[: len(tokens) // length * length].view(-1, length), about


def _of_text(
    tokenizer: TextTokenizer, text: str, length: int | None, sequences: int, recipe: Recipe
) -> Tensor:
    """(n, T) tokens of a text, T at most that of the recipe's rows unless `length` says otherwise."""
    ids = torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    if len(ids) < 2:
        raise ConfigError(
            f"--text: it has {len(ids)} {'token' if len(ids) == 1 else 'tokens'}; expected at least two, for there is "
            "no lag in less"
        )
    length = min(length or getattr(recipe.data.options, "seq_len", len(ids)), len(ids))
    n = min(sequences, len(ids) // length)
    return ids[: n * length].view(n, length)


def _words(tokenizer: TextTokenizer | None, tokens: Tensor) -> list[str] | None:
    """Each token as a short text that shows its spaces and line ends."""
    if tokenizer is None:
        return None
    shown = []
    for token in tokens[0].tolist():
        piece = tokenizer.pieces[token].decode("utf-8", "backslashreplace") or "<end>"
        piece = piece.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
        shown.append(piece if len(piece) <= 12 else piece[:11] + "…")
    return shown
