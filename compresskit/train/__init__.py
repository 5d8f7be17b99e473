"""Training: one loop, the ways of distillation built on it, and training through a code."""

from compresskit.train.distillation import IGNORED as IGNORED
from compresskit.train.distillation import (
    cached_logits,
    distill,
    distill_mutual,
    distill_sequences,
    distill_triple,
    outputs,
    written,
)
from compresskit.train.loop import Run, Shuffled, fit
from compresskit.train.quantization_aware import converted, learned_steps, quantization_aware

# The order of the reference page.
__all__ = [  # noqa: RUF022
    "fit",
    "Run",
    "Shuffled",
    "cached_logits",
    "distill",
    "written",
    "distill_sequences",
    "distill_mutual",
    "distill_triple",
    "outputs",
    "quantization_aware",
    "learned_steps",
    "converted",
]
