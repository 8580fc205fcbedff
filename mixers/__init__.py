"""Token mixers: modules that map (B, T, D) to (B, T, D) causally, looked up by name."""

from mixerlab.mixers import (  # noqa: F401  (importing registers them)
    attention,
    deltaformer,
    gated_deltanet,
    identity,
    mamba,
    mamba2,
    parallel,
    selective_attention,
    sessa,
)
from mixerlab.mixers.mixer import Mixer, State, check_room
from mixerlab.mixers.registry import (
    MIXERS,
    auto_backends,
    build_mixer,
    choose_mixers,
    needing_triton,
    register_mixer,
    without_segments,
)
from mixerlab.options import option

__all__ = [
    "MIXERS",
    "Mixer",
    "State",
    "auto_backends",
    "build_mixer",
    "check_room",
    "choose_mixers",
    "needing_triton",
    "option",
    "register_mixer",
    "without_segments",
]
