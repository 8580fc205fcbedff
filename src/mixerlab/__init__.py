"""Train decoders with interchangeable token mixers: attention, Sessa, Mamba, and your own.

from mixerlab import load_recipe, open_run, train
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixerlab.lm.recipe.load import load_recipe
    from mixerlab.lm.run.folder import Run
    from mixerlab.lm.training.fit import train

    open_run = Run.open

__all__ = ["Run", "load_recipe", "open_run", "train"]

_WHERE = {"load_recipe": "lm.recipe.load", "train": "lm.training.fit", "Run": "lm.run.folder"}


def __dir__() -> list[str]:
    return [*globals(), *__all__]


def __getattr__(name: str) -> Any:
    # Imported when asked for: torch takes seconds, and the parts of this package import its root.
    if name == "open_run":
        return __getattr__("Run").open
    if name in _WHERE:
        return getattr(importlib.import_module(f"mixerlab.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'mixerlab' has no attribute {name!r}")
