"""Models rebuilt, by their structure and not by their codes: model -> dense model.

Layers, heads, neurons and channels are taken out; products become two layers; scales and rotations
that leave the function as it is are folded into the weights, so that what is compressed afterwards
is easier to compress.
"""

from compresskit.surgery.factors import factorized
from compresskit.surgery.layers import keep_layers
from compresskit.surgery.removal import (
    Units,
    filter_norms,
    remove,
    unit_scores,
    units,
    weakest,
    zeroed,
)
from compresskit.surgery.rotation import ResidualRotation, rotate
from compresskit.surgery.smoothing import smooth, sources_of

__all__ = [
    "ResidualRotation",
    "Units",
    "factorized",
    "filter_norms",
    "keep_layers",
    "remove",
    "rotate",
    "smooth",
    "sources_of",
    "unit_scores",
    "units",
    "weakest",
    "zeroed",
]
