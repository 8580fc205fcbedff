"""Synthetic tasks: rows with a known answer, made when they are asked for."""

from mixerlab.data.tasks import (  # noqa: F401  (importing registers them)
    copying,
    diffuse_mqar,
    induction_heads,
    mad,
    mad_recall,
    mqar,
    symbol_soup,
)
