"""What is trained for: a teacher's answers matched, or weights that survive being rounded."""

from compresskit.losses.distillation import (
    LARGEST,
    TEMPERATURES,
    TopK,
    distillation_loss,
    ensemble_logits,
    feature_loss,
    forward_kl,
    jensen_shannon,
    logit_matching,
    mutual_losses,
    reverse_kl,
    softmax_temperature,
    topk_kl,
    topk_targets,
)
from compresskit.losses.straight_through import fake_quantize, straight_through

# The order of the reference page.
__all__ = [  # noqa: RUF022
    "LARGEST",
    "TEMPERATURES",
    "softmax_temperature",
    "distillation_loss",
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "logit_matching",
    "TopK",
    "topk_targets",
    "topk_kl",
    "feature_loss",
    "mutual_losses",
    "ensemble_logits",
    "straight_through",
    "fake_quantize",
]
