"""What must be known before a run can begin: what it goes on from, and its data. All ranks call this alike."""

from collections.abc import Callable
from dataclasses import replace

import torch

from mixerlab.data import DataError, DataModule, build_data
from mixerlab.lm.parallel.processes import World
from mixerlab.lm.recipe.schema import Recipe
from mixerlab.lm.run.checkpoint import CheckpointError
from mixerlab.lm.run.folder import Run
from mixerlab.lm.run.start import Start


def find_start(recipe: Recipe, world: World, say: Callable[[str], None]) -> tuple[Start, bool]:
    """What the run begins from, its checkpoint verified; and whether there is nothing to do, the run being finished.

    A restart by torchrun goes on with the run of the attempt before. Raises ConfigError, CheckpointError.
    """
    world.moved("looking for the run to continue")
    earlier = world.ask_main(lambda: _earlier_run(world))
    if earlier is not None:
        recipe = replace(recipe, resume=earlier)
    start = Start.from_plain(world.ask_main(lambda: Start.find_run(recipe).plain()))
    if start.run is None:
        if recipe.resume == "auto":
            say(f"resume=auto: no unfinished run of {recipe.name} with this recipe; starting a new one")
            if start.passed_over:
                say(start.passed_over)
        return start, False
    run, ends_here = start.run, earlier is not None or recipe.resume == "auto"
    if ends_here and world.ask_main(lambda: run.is_finished):
        say(
            f"this run is finished; to train it further: resume={run.path} with a longer horizon; to repeat it leave "
            "out resume=auto"
        )
        return start, True
    world.moved("verifying the checkpoint")
    try:
        last = run.checkpoints.last(
            world.rank, world.size, world.gather, lambda: world.is_at("verifying the checkpoint")
        )
    except CheckpointError:
        world.all_raised = True
        raise
    return Start.from_plain(world.ask_main(lambda: start.at(last, recipe).plain())), False


def _earlier_run(world: World) -> str | None:
    """The run folder that torchrun's last attempt trained, if there is something in it to go on with."""
    path = world.earlier_run
    return path if path is not None and Run(path).checkpoints.all() else None


def prepare_data(recipe: Recipe, world: World, device: torch.device) -> DataModule:
    """The data, ready on every rank, all of which are connected when it returns. Raises ConfigError, DataError."""
    data = build_data(recipe.data, recipe.seed)
    data.report = world.is_at
    world.moved("preparing the data")
    data.prepared = world.ask_main(lambda: _prepare(data))
    if world.rank and world.local_rank == 0:
        data.prepare()  # on this machine, unless the cache's folder is shared
    world.gather(None)
    world.moved("connecting")
    world.connect(device, recipe.strategy)
    if world.rank:
        data.setup()
    others = [rank for rank, found in enumerate(world.gather(data.fingerprint)) if found != data.prepared]
    if others:
        world.all_raised = True
        raise DataError(
            f"data: rank {others[0]} found other data than rank 0; expected the same documents on all machines"
        )
    return data


def _prepare(data: DataModule) -> str:
    """All that can go wrong with the data, on one rank, so that it is said once; returns their fingerprint."""
    data.prepare()
    data.setup()
    for name, rows in {"the training split": data.train_dataset(), **data.val_datasets()}.items():
        if not len(rows):
            raise DataError(f"data: {name} has no rows; expected at least one")
    return data.fingerprint
