"""Methods in another basis: a random rotation, and SmoothQuant's scales."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compresskit import surgery
from compresskit.affine import QuantSpec
from compresskit.methods import awq, hadamard, round_to_nearest, smooth
from compresskit.methods.smooth import smoothing_scale
from compresskit.stats import InputStats

# Outputs of mit-han-lab/smoothquant, commit c61476d (smooth.py), for the weight of
# tests/test_awq.py and the largest magnitudes of its inputs.
REFERENCE = np.load(Path(__file__).parent / "data" / "scales.npz")
nearest = partial(round_to_nearest, spec=QuantSpec(4))


def random(m=6, n=37, *, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def outliers(tokens=100, n=37):
    x = random(tokens, n, seed=1)
    x[:, 3] *= 50
    return x


@pytest.mark.parametrize("alpha", ["0.5", "0.85"])
def test_scales_are_those_of_the_published_code(alpha):
    weight, max_abs = (torch.from_numpy(REFERENCE[key]) for key in ("weight", "max_abs"))
    scale = smoothing_scale(max_abs.float(), [weight, 1.3 * weight.flip(0)], alpha=float(alpha))
    for mine, theirs in (
        (1 / scale, REFERENCE[f"smooth_{alpha}_norm"]),
        (weight[:8] * scale, REFERENCE[f"smooth_{alpha}_weight"]),
    ):
        torch.testing.assert_close(mine, torch.from_numpy(theirs), rtol=1e-6, atol=0)


def test_at_one_half_inputs_and_columns_get_the_same_range():
    weight, x = random(), outliers()
    scale = smoothing_scale(x.abs().amax(0), [weight], alpha=0.5)
    torch.testing.assert_close((x / scale).abs().amax(0), (weight * scale).abs().amax(0))
    level = smoothing_scale(x.abs().amax(0), [weight], alpha=1)
    torch.testing.assert_close((x / level).abs().amax(0), torch.ones(37))


@pytest.mark.parametrize("method", [partial(hadamard, seed=2), smooth])
def test_the_inner_method_gets_weight_and_moments_in_the_new_basis(method):
    weight, stats = random(), InputStats.of(outliers())
    seen = []

    def spy(weight, stats):
        seen.extend([weight, stats])
        return nearest(weight, stats)

    code = method(weight, stats, method=spy)
    inner, moments = seen
    torch.testing.assert_close(code.basis.undo(inner), weight, rtol=1e-5, atol=1e-5)
    delta, error = weight - code.decode(), moments.distortion(inner - code.code.decode())
    torch.testing.assert_close(error, stats.distortion(delta), rtol=1e-4, atol=0)


def test_a_rotation_halves_the_error_of_outliers_and_leaves_that_of_gaussians():
    gaussian = random(64, 64)
    spiky = gaussian.clone()
    spiky[:, :2] *= 40
    gains = []
    for weight in (gaussian, spiky):
        errors = [
            (weight - code.decode()).square().sum()
            for code in (nearest(weight), hadamard(weight, method=nearest))
        ]
        gains.append((errors[0] / errors[1]).item())
    assert 0.8 < gains[0] < 1.25
    assert gains[1] > 2


def test_no_knowledge_stays_no_knowledge_in_a_rotated_basis():
    seen = []

    def spy(weight, stats):
        seen.append(stats)
        return nearest(weight, stats)

    hadamard(random(), None, method=spy)
    hadamard(random(), InputStats.isotropic(37), method=spy)
    assert seen == [None, None]


@pytest.mark.parametrize(
    "needy", [partial(awq, spec=QuantSpec(4)), partial(smooth, method=nearest)]
)
def test_methods_that_need_absolute_values_refuse_a_rotated_basis(needy):
    stats = InputStats.of(outliers())
    with pytest.raises(ValueError, match="after a rotation it is unknown"):
        hadamard(random(), stats, method=needy)


@pytest.mark.parametrize("method", [hadamard, smooth])
def test_dead_inputs_and_dead_rows_do_no_harm(method):
    x, weight = outliers(), random()
    x[:, 7] = 0
    weight[2] = 0
    weight[:, 5] = 0
    decoded = method(weight, InputStats.of(x), method=nearest).decode()
    assert decoded.isfinite().all()
    # undoing a rotation sums zeros, undoing a scale divides them
    assert (decoded[2] == 0).all()
    dead = InputStats.of(torch.zeros(4, 37))
    assert method(weight, dead, method=nearest).decode().isfinite().all()


@pytest.mark.parametrize("method", [hadamard, smooth])
@pytest.mark.parametrize(
    ("weight", "stats", "message"),
    [
        (torch.full((2, 3), torch.inf), None, "the weight holds NaN or infinite"),
        (torch.ones(3), None, "a non-empty matrix is needed"),
        (torch.ones(2, 3), InputStats.isotropic(4), "moments of 4 inputs for a weight with 3"),
        (
            torch.ones(2, 3),
            InputStats(1, torch.full((3, 3), torch.nan), torch.ones(3), torch.ones(3)),
            "second moments hold NaN",
        ),
    ],
)
def test_what_they_cannot_do_is_refused(method, weight, stats, message):
    with pytest.raises(ValueError, match=message):
        method(weight, stats, method=nearest)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -0.1}, r"alpha=-0.1; it must be from 0 to 1"),
        ({"alpha": torch.nan}, "alpha=nan"),
        ({"scale_dtype": torch.int8}, "it must be one of"),
    ],
)
def test_wrong_options_of_smooth_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        smooth(random(), InputStats.of(outliers()), method=nearest, **arguments)


def pair_after_a_norm():
    torch.manual_seed(0)
    return nn.ModuleDict({"norm": nn.LayerNorm(8), "a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})


def test_what_would_be_scaled_twice_is_refused():
    stats = dict.fromkeys("ab", InputStats.of(torch.randn(20, 8)))
    tied = pair_after_a_norm()
    tied["b"].weight = tied["a"].weight
    with pytest.raises(ValueError, match=r"\['a', 'b'\] would be scaled twice"):
        surgery.smooth(tied, stats, sources={"norm": ["a", "b"]})
    with pytest.raises(ValueError, match=r"\['b'\] would be scaled twice"):
        surgery.smooth(pair_after_a_norm(), stats, sources={"norm": ["b"], "a": ["b"]})


def test_a_table_is_no_source():
    model = nn.ModuleDict({"table": nn.Embedding(8, 8), "a": nn.Linear(8, 8)})
    stats = {"a": InputStats.of(torch.randn(20, 8))}
    with pytest.raises(ValueError, match=r"no norm or dense layer is named \['table'\]"):
        surgery.smooth(model, stats, sources={"table": ["a"]})
