"""The formulas of the theorems, in float64.

Probabilities are arrays whose entries along the last axis (or `axis`) sum to 1 within 1e-6.
Whatever `numpy.asarray` takes is accepted, and torch tensors of any dtype and device. A scalar
result is a `float`, any other an array. `information` has the entropies, divergences and
rate-distortion limits of chapter 2, in bits unless `unit="nats"`; `learning` has the terms of the
bounds on a student's risk of chapter 4, which contain divergences in nats and nothing in bits
except the length of a code; `quantizers` has the scalar quantizers of chapter 7;
`straight_through` compares the gradient that training for low precision makes up, in chapter 10,
with the true one where that is known; `blocks` has the error of the block formats of chapter 11.
"""

from compresskit.theory.blocks import BlockError, absmax_block_error, minmax_block_error
from compresskit.theory.information import (
    WaterFilling,
    binary_entropy,
    bretagnolle_huber_bound,
    cross_entropy,
    entropy,
    gaussian_distortion,
    gaussian_rate,
    kl_divergence,
    linear_layer_rate,
    pinsker_bound,
    reverse_water_filling,
    sqnr_db,
    total_variation,
)
from compresskit.theory.learning import (
    Estimate,
    RiskBound,
    confidence_term,
    distillation_bound,
    divergence_term,
    fresh_sample_bound,
    gibbs_risk,
    linear_bound,
    linear_supremum,
    massart_bound,
    mean_total_variation,
    network_complexity,
    occam_term,
    rademacher,
    rademacher_finite,
    rademacher_signs,
    softmax_complexity,
)
from compresskit.theory.quantizers import (
    SPACE_FILLING_BITS,
    SPACE_FILLING_DB,
    CodedQuantizer,
    ScalarQuantizer,
    bennett_integral,
    entropy_coded_uniform,
    lloyd_max_quantizer,
    panter_dite,
    quantizer_distortion,
)
from compresskit.theory.straight_through import (
    NoisyQuantizer,
    Oscillation,
    SquaredLoss,
    noisy_quantizer,
    oscillation,
    straight_through_bias,
)

# The order of the reference page: as in the files.
__all__ = [  # noqa: RUF022
    "WaterFilling",
    "entropy",
    "cross_entropy",
    "kl_divergence",
    "total_variation",
    "pinsker_bound",
    "bretagnolle_huber_bound",
    "binary_entropy",
    "gaussian_distortion",
    "gaussian_rate",
    "reverse_water_filling",
    "linear_layer_rate",
    "sqnr_db",
    "RiskBound",
    "gibbs_risk",
    "mean_total_variation",
    "divergence_term",
    "confidence_term",
    "occam_term",
    "distillation_bound",
    "fresh_sample_bound",
    "Estimate",
    "rademacher",
    "rademacher_finite",
    "rademacher_signs",
    "massart_bound",
    "linear_supremum",
    "linear_bound",
    "softmax_complexity",
    "network_complexity",
    "ScalarQuantizer",
    "lloyd_max_quantizer",
    "quantizer_distortion",
    "bennett_integral",
    "panter_dite",
    "CodedQuantizer",
    "entropy_coded_uniform",
    "SPACE_FILLING_BITS",
    "SPACE_FILLING_DB",
    "NoisyQuantizer",
    "noisy_quantizer",
    "SquaredLoss",
    "straight_through_bias",
    "Oscillation",
    "oscillation",
    "BlockError",
    "absmax_block_error",
    "minmax_block_error",
]
