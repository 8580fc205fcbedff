"""Token mixers: modules that map (B, T, D) to (B, T, D) causally, looked up by name."""

from mixers import (  # noqa: F401  (importing registers them)
    attention,
    identity,
    mamba,
    mamba2,
    parallel,
    selective_attention,
    sessa,
)
from mixers.mixer import Mixer, State, check_room
from mixers.registry import (
    build_mixer,
    mixer_class,
    mixer_config,
    mixer_names,
    register_mixer,
    registered_names,
)

__all__ = [
    "Mixer",
    "State",
    "build_mixer",
    "check_room",
    "mixer_class",
    "mixer_config",
    "mixer_names",
    "register_mixer",
    "registered_names",
]
