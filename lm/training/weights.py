"""Starting a new run from the weights of another, as far as they fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mixerlab.data import DataModule
from mixerlab.lm.model.decoder import Decoder
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.parallel.strategies import piece
from mixerlab.lm.run.checkpoint import read
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.shards import Pieces
from mixerlab.lm.run.weights import PREFIX
from mixerlab.options import ConfigError

NAMED = 4
"""How many tensors that do not fit are named."""


def find_weights(source: str) -> Path:
    """The checkpoint that `init_from` names, a run's last or one in a run's folder, verified. Raises ConfigError."""
    path = Path(source).absolute()
    is_checkpoint = path.name.startswith("step-")
    try:
        # Its plug-ins are allowed since its recipe is never asked for: nothing is imported.
        run = Run.open(path.parents[1] if is_checkpoint else path, allow_plugins=True)
        return run.checkpoints.named(path.name.removeprefix("step-") if is_checkpoint else "last")
    except ConfigError as error:
        raise ConfigError(f"init_from = {source!r}: {error}") from None


def load_weights(
    folder: Path, decoder: Decoder, data: DataModule, world: World, say: Callable[[str], None]
) -> None:
    """Gives a decoder, sharded or not, the weights that a checkpoint has for it, and says which it lacks.

    All ranks call this alike. Raises ConfigError where none fits, or the data's tokens are others than the run's.
    """
    world.moved("reading the weights to start from")
    world.ask_main(lambda: _check_tokens(folder, data))
    # Each rank reads its rows of each tensor.
    state = read(folder, whole=False)["state_dict"]
    saved = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    own = decoder.state_dict()
    fitting = {name: piece(saved[name], name, decoder) for name in own if _fits(saved.get(name), own[name])}
    if not fitting:
        world.all_raised = True
        raise ConfigError(f"init_from: no tensor of {folder} has a name and a shape of this model's")
    decoder.load_state_dict(fitting, strict=False)
    if world.rank == 0:
        said = [f"weights of {folder}: {len(fitting)} of {len(own)} tensors"]
        if fresh := [name for name in own if name not in fitting]:
            said.append(f"initialised anew: {_listed(fresh)}")
        if spare := [name for name in saved if name not in fitting]:
            said.append(f"not used: {_listed(spare)}")
        say("; ".join(said))


def _check_tokens(folder: Path, data: DataModule) -> None:
    run = Run(folder.parents[1])
    if data.tokenizer and run.has_tokenizer and run.tokenizer().pieces != data.tokenizer.pieces:
        raise ConfigError(
            f"init_from: {run.path} has another tokenizer than the data, so its embeddings are of other tokens; "
            f"expected data.tokenizer=file data.tokenizer_file={run.path / 'tokenizer.json'}"
        )


def _fits(saved: Any, own: Tensor) -> bool:
    return isinstance(saved, (Tensor, Pieces)) and tuple(saved.shape) == tuple(own.shape)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
