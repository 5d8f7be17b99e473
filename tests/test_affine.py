"""The uniform grid: its bound, its optimality, its sizes, its refusals."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compresskit.affine import Quantized, QuantSpec, fit_grid, minmax, mse, percentile
from compresskit.code import Array, Bits
from compresskit.methods import round_to_nearest

GROUPS = [None, "tensor", 1, 7, 32, 1000]


def gaussian(rows=24, columns=50, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def stored_step(code):
    """The stored scale of every entry of the decoded matrix."""
    columns = code.levels.shape[1]
    scale = code.scale.decode()
    return (
        scale if scale.shape[1] == 1 else scale.repeat_interleave(code.group_size, 1)[:, :columns]
    )


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8, 12])
def test_no_weight_moves_by_more_than_half_a_stored_step(bits, symmetric, group_size, scale_dtype):
    weight = gaussian()
    code = round_to_nearest(
        weight, spec=QuantSpec(bits, symmetric, group_size), scale_dtype=scale_dtype
    )
    error = (weight - code.decode()).abs()
    # float32 rounding of weights up to 5: a few units in the last place
    assert (error <= stored_step(code) / 2 + 2e-6).all()


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_level_is_the_nearest_of_all_levels(bits, symmetric):
    weight = gaussian(8, 16)
    code = round_to_nearest(weight, spec=QuantSpec(bits, symmetric), fit=percentile_90)
    scale, zero = code.scale.decode(), code.zero.decode()
    points = scale[..., None] * (torch.arange(2**bits) - zero[..., None])  # (8, 1, levels)
    best = (weight[..., None] - points).abs().amin(-1)
    torch.testing.assert_close((weight - code.decode()).abs(), best, rtol=0, atol=1e-6)


percentile_90 = partial(percentile, q=90)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_symmetric_step_is_the_finest_that_covers_the_range(bits):
    """Brute force over steps: any finer one leaves some weight further than half a step away."""
    spec = QuantSpec(bits, symmetric=True)
    weight = torch.tensor([[-1.0, 0.3, 1.0]])
    step = fit_grid(weight, spec, scale_dtype=torch.float32).scale.item()
    levels = torch.arange(2**bits) - spec.center

    def worst(step):
        return ((weight.T - step * levels).abs().amin(1) / step).max()

    assert worst(step) <= 0.5 + 1e-5
    assert all(worst(step * f) > 0.5 for f in torch.linspace(0.5, 0.999, 50))


def test_the_symmetric_scale_is_that_of_the_gptq_reference():
    weight = gaussian()
    for bits in (2, 3, 4, 8):
        grid = fit_grid(weight, QuantSpec(bits, symmetric=True), scale_dtype=torch.float32)
        reference = 2 * weight.abs().amax(1, keepdim=True) / (2**bits - 1)
        torch.testing.assert_close(grid.scale, reference)
        assert (grid.zero == 2 ** (bits - 1)).all()


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(1, 25),
)
def test_an_asymmetric_grid_holds_zero_exactly(values, bits, group_size):
    weight = torch.tensor([[0.0, *values]])
    code = round_to_nearest(
        weight, spec=QuantSpec(bits, group_size=group_size), scale_dtype=torch.float32
    )
    assert code.decode()[0, 0] == 0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 4])
def test_rows_of_zeros_decode_to_zeros(bits, symmetric):
    weight = gaussian(3, 10)
    weight[1] = 0
    assert (round_to_nearest(weight, spec=QuantSpec(bits, symmetric)).decode()[1] == 0).all()


def test_a_group_that_does_not_divide_the_width_has_its_own_last_grid():
    weight = gaussian(4, 10)
    code = round_to_nearest(weight, spec=QuantSpec(4, group_size=4))
    parts = [
        round_to_nearest(weight[:, a:b].contiguous(), spec=QuantSpec(4)).decode()
        for a, b in ((0, 4), (4, 8), (8, 10))
    ]
    assert torch.equal(code.decode(), torch.cat(parts, 1))
    assert code.size_table() == {"levels": 20, "scale": 24, "zero": 6}


def test_one_bit_symmetric_is_the_sign_and_its_best_scale_the_mean_magnitude():
    """argmin_s ||w - (s/2) sign(w)||^2 is s = 2 mean|w| (Rastegari et al., XNOR-Net, 2016)."""
    weight = gaussian(1, 4000)
    code = round_to_nearest(weight, spec=QuantSpec(1, symmetric=True), fit=partial(mse, steps=400))
    assert torch.equal(code.decode().sign(), weight.sign())
    assert code.scale.decode().item() == pytest.approx(2 * weight.abs().mean().item(), rel=0.01)


def exact_least_error(row, spec):
    """Brute force over all ways to give a symmetric level to each weight, with the best scale."""
    levels = [level - spec.center for level in range(spec.levels)]
    best = row.square().sum().item()
    for choice in itertools.product(levels, repeat=len(row)):
        q = torch.tensor(choice)
        if q @ row > 0:
            best = min(best, (row @ row - (q @ row) ** 2 / (q @ q)).item())
    return best


@pytest.mark.parametrize("seed", range(4))
def test_the_mse_range_is_within_three_percent_of_brute_force(seed):
    row = gaussian(1, 5, seed)
    spec = QuantSpec(2, symmetric=True)
    code = round_to_nearest(row, spec=spec, fit=partial(mse, steps=512), scale_dtype=torch.float32)
    found = (row - code.decode()).square().sum().item()
    assert found <= 1.03 * exact_least_error(row[0], spec)  # the search has 512 steps


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_never_loses_to_minmax_or_percentile(bits, symmetric):
    weight = gaussian(16, 128)
    errors = {}
    for fit in (mse, minmax, percentile_90):
        code = round_to_nearest(weight, spec=QuantSpec(bits, symmetric), fit=fit)
        errors[fit] = (weight - code.decode()).square().sum().item()
    assert errors[mse] < errors[minmax]
    assert errors[mse] <= errors[percentile_90] * 1.01  # 64 candidates, not a continuum


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_whole_percentile_is_the_range(symmetric):
    spec = QuantSpec(4, symmetric)
    weight = gaussian()
    whole = round_to_nearest(weight, spec=spec, fit=partial(percentile, q=100))
    assert torch.equal(whole.decode(), round_to_nearest(weight, spec=spec).decode())


def test_percentile_clips_the_share_it_says():
    weight = gaussian(1, 10_000)
    code = round_to_nearest(weight, spec=QuantSpec(8), fit=partial(percentile, q=98))
    beyond = (weight - code.decode()).abs() > code.scale.decode()
    assert 0.01 < beyond.float().mean() <= 0.02  # those within a step of the end are not seen


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_are_the_next_stored_value_up(scale_dtype):
    weight = gaussian(200, 8) * torch.logspace(-5, 3, 200)[:, None]
    ideal = fit_grid(weight, QuantSpec(4), scale_dtype=torch.float32).scale
    scale = fit_grid(weight, QuantSpec(4), scale_dtype=scale_dtype).scale
    below = (scale.to(scale_dtype).view(torch.int16) - 1).view(scale_dtype).float()
    assert torch.equal(scale.to(scale_dtype).float(), scale)
    assert ((below < ideal) & (ideal <= scale)).all()


@pytest.mark.parametrize("unit", [1e6, 1e-8])
def test_a_scale_out_of_the_range_of_half_precision_is_refused_with_a_way_out(unit):
    weight = gaussian() * unit
    with pytest.raises(ValueError, match=r"scale_dtype=torch\.float32"):
        round_to_nearest(weight, spec=QuantSpec(2))
    assert (
        round_to_nearest(weight, spec=QuantSpec(2), scale_dtype=torch.float32)
        .decode()
        .isfinite()
        .all()
    )


def test_weights_too_large_for_any_scale_are_refused():
    with pytest.raises(ValueError, match="rescale the weight"):
        round_to_nearest(
            torch.tensor([[3e38, -3e38]]), spec=QuantSpec(4), scale_dtype=torch.float32
        )


def test_a_grid_refuses_a_weight_of_another_shape():
    weight = gaussian(4, 128)
    grid = fit_grid(weight, QuantSpec(4, group_size=64))
    with pytest.raises(ValueError, match=r"a grid for \(4, 128\)"):
        grid.nearest(weight[:, 64:65])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_quantized_as_their_float32_values(dtype):
    weight = gaussian().to(dtype)
    a = round_to_nearest(weight, spec=QuantSpec(4)).decode()
    assert torch.equal(a, round_to_nearest(weight.float(), spec=QuantSpec(4)).decode())


def test_transposed_views_are_quantized_as_their_contiguous_copies():
    weight = gaussian(50, 24).T
    for group_size in GROUPS:
        spec = QuantSpec(4, group_size=group_size)
        a, b = round_to_nearest(weight, spec=spec), round_to_nearest(weight.contiguous(), spec=spec)
        assert torch.equal(a.decode(), b.decode())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(3), "non-empty matrix"),
        (torch.zeros(3, 0), "non-empty matrix"),
        (torch.tensor([[1.0, torch.nan]]), "NaN or infinite"),
        (torch.tensor([[1.0, -torch.inf]]), "NaN or infinite"),
    ],
)
def test_weights_that_have_no_grid_are_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        round_to_nearest(weight, spec=QuantSpec(4))


@pytest.mark.parametrize("bits", [0, 17, 3.5, True])
def test_bits_outside_1_to_16_are_refused(bits):
    with pytest.raises(ValueError, match="from 1 to 16"):
        QuantSpec(bits)


@pytest.mark.parametrize("group_size", [0, -1, 2.0, "row", True])
def test_a_group_size_that_is_none_is_refused(group_size):
    with pytest.raises(ValueError, match='None for whole rows, or "tensor"'):
        QuantSpec(4, group_size=group_size)


def test_other_options_out_of_range_are_refused():
    weight = gaussian()
    with pytest.raises(ValueError, match="True or False"):
        QuantSpec(4, symmetric=1)
    with pytest.raises(ValueError, match="at most 100 percent"):
        round_to_nearest(weight, spec=QuantSpec(4), fit=partial(percentile, q=0))
    with pytest.raises(ValueError, match="1 or more"):
        round_to_nearest(weight, spec=QuantSpec(4), fit=partial(mse, steps=0))
    with pytest.raises(ValueError, match="float32"):
        round_to_nearest(weight, spec=QuantSpec(4), scale_dtype=torch.float64)


@pytest.mark.parametrize(
    ("levels", "scale", "zero", "size"),
    [
        ((4, 6), (4, 2), (4, 2), 2),
        ((4, 6), (3, 3), (3, 3), 2),
        ((4, 6), (4, 3), (1, 3), 2),
        ((4, 6), (4, 6), (4, 6), 0),
        ((4, 6), (4, 1), (4, 1), 7),
        ((24,), (1, 1), (1, 1), 24),
    ],
)
def test_parts_of_a_quantized_matrix_that_do_not_fit_are_refused(levels, scale, zero, size):
    parts = (
        Bits(torch.zeros(levels, dtype=torch.uint8), 4),
        Array(torch.ones(scale)),
        Bits(torch.zeros(zero, dtype=torch.uint8), 4),
    )
    with pytest.raises(ValueError, match="levels of shape"):
        Quantized(*parts, size)
