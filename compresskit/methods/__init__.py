"""Methods that turn one weight matrix into a code: (weight, stats, *, options) -> Code."""

from compresskit.methods.round_to_nearest import round_to_nearest

__all__ = ["round_to_nearest"]
