"""AWQ: the published code's scales, errors and clipping, and what may be asked of it."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from compresskit import affine
from compresskit.affine import QuantSpec
from compresskit.basis import InBasis, Scales
from compresskit.code import Array
from compresskit.methods import awq, round_to_nearest
from compresskit.methods.awq import awq_scale
from compresskit.stats import InputStats

# Outputs of mit-han-lab/llm-awq, commit d6e797a (auto_scale.py, auto_clip.py), for a (256, 512)
# weight and 512 tokens with outliers and one dead input.
REFERENCE = np.load(Path(__file__).parent / "data" / "scales.npz")
GRIDS = {
    "b4_g128": QuantSpec(4, group_size=128),
    "b4_grow": QuantSpec(4),
    "b3_g128": QuantSpec(3, group_size=128),
    "b3_grow": QuantSpec(3),
}
every = pytest.mark.parametrize("name", GRIDS)
exact = partial(awq, scale_dtype=torch.float32)  # as the published code keeps its scales


def reference(key):
    return torch.from_numpy(REFERENCE[key])


@pytest.fixture(scope="module")
def weight():
    return reference("weight")


@pytest.fixture(scope="module")
def stats():
    return InputStats.of(reference("x"))


@every
def test_the_errors_of_all_powers_are_those_of_the_published_code(name, weight, stats):
    signal = stats.distortion(weight)
    errors = []
    for step in range(20):
        basis = Scales(Array(awq_scale(stats.mean_abs, step / 20)))
        code = round_to_nearest(basis.into(weight), spec=GRIDS[name], scale_dtype=torch.float32)
        errors.append(stats.distortion(weight - basis.undo(code.decode())) / signal)
    # 1e-5: theirs are float32 sums over tokens, ours float64 traces with the moments
    torch.testing.assert_close(
        torch.stack(errors), reference(f"awq_{name}_errors"), rtol=1e-5, atol=0
    )


@every
def test_it_chooses_the_power_and_the_weights_of_the_published_code(name, weight, stats):
    code = exact(weight, stats, spec=GRIDS[name])
    scale = code.basis.scale.decode()
    expected = awq_scale(stats.mean_abs, float(REFERENCE[f"awq_{name}_ratio"]))
    assert torch.equal(scale, expected)
    torch.testing.assert_close(scale, reference(f"awq_{name}_scale"), rtol=1e-6, atol=0)
    # 1e-6: the scales of the input may differ in the last place of float32, a level may not
    torch.testing.assert_close(
        code.decode()[:8], reference(f"awq_{name}_weight"), rtol=1e-6, atol=1e-8
    )


@every
def test_clipping_finds_the_ranges_of_the_published_code(name, weight, stats):
    code = exact(weight, stats, spec=GRIDS[name], clip=True)
    scaled = code.basis.into(weight)
    limit = reference(f"awq_{name}_limit")
    groups = scaled.reshape(256, limit.shape[1], -1)
    clipped = groups.clamp(-limit[..., None], limit[..., None]).reshape(256, 512)
    expected = round_to_nearest(clipped, spec=GRIDS[name], scale_dtype=torch.float32)
    same = code.code.levels.decode() == expected.levels.decode()
    # a group in a thousand may have two ranges whose errors differ by float32 rounding only
    assert same.float().mean() > 0.999
    error = stats.distortion(weight - code.decode()) / stats.distortion(weight)
    assert error.item() == pytest.approx(float(REFERENCE[f"awq_{name}_clipped_error"]), rel=1e-5)


@every
def test_stored_in_half_precision_it_loses_next_to_nothing(name, weight, stats):
    half, full = (make(weight, stats, spec=GRIDS[name]) for make in (awq, exact))
    errors = [stats.distortion(weight - code.decode()).item() for code in (half, full)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert half.nbytes < full.nbytes
    assert half.basis.nbytes == 2 * 512


def random(m=6, n=20, *, seed=0):
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def skewed(n=20, tokens=100):
    return random(tokens, n, seed=1) * torch.linspace(-3, 3, n).exp()


SPEC = QuantSpec(3, group_size=8)  # groups of 8, 8 and 4


@pytest.mark.parametrize(
    ("spec", "clip"),
    [
        (SPEC, False),
        (QuantSpec(4, symmetric=True), False),
        (QuantSpec(2, group_size=1), False),
        (QuantSpec(4, symmetric=True), True),
        (QuantSpec(2), True),
    ],
)
def test_it_is_never_worse_than_rounding_to_nearest(spec, clip):
    """Power 0 and range 1.0 are among the candidates.

    With groups, clipping may be worse: it judges each group as if the others had no error.
    """
    weight, stats = random(), InputStats.of(skewed())
    plain = round_to_nearest(weight, spec=spec, scale_dtype=torch.float32)
    code = exact(weight, stats, spec=spec, clip=clip)
    assert stats.distortion(weight - code.decode()) <= stats.distortion(weight - plain.decode())


def test_clipping_never_raises_the_error_of_a_row():
    weight, stats = random(64, 40), InputStats.of(skewed(40))
    errors = []
    for clip in (False, True):
        code = exact(weight, stats, spec=QuantSpec(3), clip=clip)
        delta = (weight - code.decode()).double()
        errors.append(((delta @ stats.second.double()) * delta).sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < errors[0].sum()


def test_it_beats_rounding_to_nearest_where_inputs_differ_and_not_where_they_do_not():
    weight = random(64, 40)
    for x, gain in ((skewed(40, 400), True), (random(400, 40, seed=2), False)):
        stats = InputStats.of(x)
        plain, code = (m(weight, stats, spec=QuantSpec(3)) for m in (round_to_nearest, awq))
        ratio = stats.distortion(weight - code.decode()) / stats.distortion(weight - plain.decode())
        assert (ratio < 0.7) == gain, ratio


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("fit", [affine.minmax, affine.mse])
def test_without_knowledge_of_the_inputs_scales_are_one(clip, fit):
    weight = random()
    code = awq(weight, None, spec=SPEC, fit=fit, clip=clip)
    assert torch.equal(code.basis.scale.decode(), torch.ones(20))
    if not clip:
        plain = round_to_nearest(weight, spec=SPEC, fit=fit)
        assert torch.equal(code.decode(), plain.decode())


@pytest.mark.parametrize("clip", [False, True])
def test_dead_inputs_and_dead_rows_do_no_harm(clip):
    x, weight = skewed(), random()
    x[:, [0, 7]] = 0
    weight[2] = 0
    weight[:, 5] = 0
    stats = InputStats.of(x)
    decoded = awq(weight, stats, spec=SPEC, clip=clip).decode()
    assert decoded.isfinite().all()
    assert (decoded[2] == 0).all()
    assert (decoded[:, 5] == 0).all()
    everything_dead = InputStats.of(torch.zeros(4, 20))
    assert awq(weight, everything_dead, spec=SPEC, clip=clip).decode().isfinite().all()


def test_fewer_tokens_than_inputs_are_enough():
    stats = InputStats.of(skewed(tokens=3))
    weight = random()
    plain, code = (m(weight, stats, spec=SPEC) for m in (round_to_nearest, awq))
    assert stats.distortion(weight - code.decode()) <= stats.distortion(weight - plain.decode())


@pytest.mark.parametrize("shape", [(1, 20), (6, 1), (1, 1)])
@pytest.mark.parametrize("clip", [False, True])
def test_layers_of_one_row_or_one_column_are_rounded(shape, clip):
    weight = random(*shape)
    stats = InputStats.of(skewed()[:, : shape[1]])
    decoded = awq(weight, stats, spec=QuantSpec(8), clip=clip).decode()
    assert stats.distortion(weight - decoded) < 1e-4 * stats.distortion(weight)


def damaged(place, value):
    tensors = [random(20, 20).square(), torch.ones(20), torch.ones(20)]
    tensors[place].view(-1)[0] = value
    return InputStats(10, *tensors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.full((6, 20), torch.nan)}, "the weight holds NaN or infinite"),
        ({"weight": torch.ones(20)}, "a non-empty matrix is needed"),
        ({"stats": InputStats.isotropic(21)}, "moments of 21 inputs for a weight with 20"),
        ({"stats": damaged(0, torch.inf)}, "second moments hold NaN or infinite"),
        ({"stats": damaged(1, torch.nan)}, "after a rotation it is unknown"),
        ({"grid": 0}, "grid=0; .* for instance 20"),
        ({"grid": 2.5}, "grid=2.5"),
        ({"clip": True, "spec": QuantSpec(4, group_size="tensor")}, "a number such as 128"),
        ({"scale_dtype": torch.int8}, "scale_dtype=torch.int8; it must be one of"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments, message):
    options = {"weight": random(), "stats": InputStats.of(skewed()), "spec": SPEC} | arguments
    with pytest.raises(ValueError, match=message):
        awq(**options)


def test_a_wrong_power_is_noticed():
    """The comparison with the published errors fails for powers shifted by one step."""
    weight, stats = reference("weight"), InputStats.of(reference("x"))
    basis = Scales(Array(awq_scale(stats.mean_abs, 6 / 20)))
    code = round_to_nearest(basis.into(weight), spec=QuantSpec(4), scale_dtype=torch.float32)
    error = stats.distortion(weight - InBasis(code, basis).decode()) / stats.distortion(weight)
    expected = REFERENCE["awq_b4_grow_errors"]
    assert error.item() == pytest.approx(expected[6], rel=1e-5)
    assert error.item() != pytest.approx(expected[5], rel=1e-3)
    assert error.item() != pytest.approx(expected[7], rel=1e-3)


def test_moments_of_any_size_are_judged():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 8, generator=generator), torch.randn(9, 8, generator=generator)
    usual = awq(weight, InputStats.of(x), spec=QuantSpec(2), scale_dtype=torch.float32)
    for size in (3e18, 1e-15):
        stats = InputStats.of(x * size)
        code = awq(100 * weight, stats, spec=QuantSpec(2), scale_dtype=torch.float32)
        torch.testing.assert_close(code.decode(), 100 * usual.decode())
