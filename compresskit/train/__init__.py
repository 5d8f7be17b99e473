"""Training: one loop, the ways of distillation built on it, through a code, with zeros, adapters.

`lora` attaches low-rank adapters and `memory` counts what training holds; both are modules, since
their names are short where they stand for themselves.
"""

from compresskit.train import lora as lora
from compresskit.train import memory as memory
from compresskit.train.adam8bit import AdamW8bit
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
from compresskit.train.pruning import (
    Cubic,
    Round,
    Tickets,
    fewer,
    gradual,
    iterative_magnitude,
    masked,
    masks_of,
    support,
    unmasked,
)
from compresskit.train.quantization_aware import converted, learned_steps, quantization_aware
from compresskit.train.shared import shared_values
from compresskit.train.sparsity import expected_l0, gated, l1_norm, proximal_l1, soft_threshold
from compresskit.train.subspace import Subspace

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
    "shared_values",
    "masked",
    "unmasked",
    "masks_of",
    "support",
    "Cubic",
    "gradual",
    "iterative_magnitude",
    "fewer",
    "Round",
    "Tickets",
    "soft_threshold",
    "l1_norm",
    "proximal_l1",
    "gated",
    "expected_l0",
    "AdamW8bit",
    "Subspace",
]
