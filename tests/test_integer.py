"""Integer products: exact sums, the rounding of inputs, and two references.

tests/data/int8.npz holds a 32 x 512 layer with outlier inputs (columns 17, 200, 411) and what
bitsandbytes 0.50.2 (LLM.int8(), float16, thresholds 0, 3 and 6) and torchao 0.18 (dynamic int8
inputs, int8 weights, bias i/256) compute for it on a CPU.
"""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compresskit import container, integer, layers
from compresskit.affine import QuantSpec, fit_grid
from compresskit.code import Array, Bits
from compresskit.integer import Integer, integer_matmul, quantize_tensor, quantize_tokens
from compresskit.methods import int8, llm_int8, round_to_nearest
from compresskit.model import compress, decoded
from compresskit.stats import InputStats

REFERENCE = np.load(Path(__file__).parent / "data" / "int8.npz")
int8_exact = partial(int8, scale_dtype=torch.float32)


def reference(name):
    return torch.from_numpy(REFERENCE[name])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def levels(*shape, seed=0):
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator(seed))


def relative(approx, exact):
    return ((approx.double() - exact.double()).norm() / exact.double().norm()).item()


@pytest.fixture(params=["native", "floats"])
def kernel(request, monkeypatch):
    """Both ways of multiplying: the library's kernel, and the one that works everywhere."""
    if request.param == "floats":
        monkeypatch.setattr(integer, "_native_is_exact", lambda device: False)


# --- the product of levels ----------------------------------------------------------------------


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("t", "n", "m"),
    [(1, 1, 1), (1, 7, 3), (17, 8, 8), (5, 1023, 2), (32, 1024, 9), (3, 2500, 4), (0, 4, 3)],
)
def test_the_sum_is_that_of_int64(t, n, m):
    a, b = levels(t, n), levels(n, m, seed=1)
    product = integer_matmul(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a.long() @ b.long())


@pytest.mark.usefixtures("kernel")
def test_the_largest_sums_that_fit_are_exact():
    a = torch.full((2, integer.MOST_TERMS), -128, dtype=torch.int8)
    assert integer_matmul(a, a.T).unique().tolist() == [integer.MOST_TERMS * 2**14]
    assert integer_matmul(a, torch.full_like(a.T, 127)).min() == -128 * 127 * integer.MOST_TERMS


@pytest.mark.usefixtures("kernel")
def test_large_sums_that_are_odd_are_exact_too():
    a = torch.full((1, 5000), -128, dtype=torch.int8)
    a[0, ::1000] = 127  # sums of more than 1024 such products are beyond float32
    assert integer_matmul(a, a.T).item() == (a.long() @ a.long().T).item()


def test_one_term_more_could_overflow_and_is_refused():
    a = torch.full((1, integer.MOST_TERMS + 1), -128, dtype=torch.int8)
    assert (a.int() @ a.T.int()).item() == -(2**31)  # the true sum is +2**31
    with pytest.raises(ValueError, match="131072 products could overflow an int32; 131071 fit"):
        integer_matmul(a, a.T)


def test_float32_sums_of_1024_products_are_exact_and_of_more_are_not():
    a = torch.full((1, 1025), -128, dtype=torch.int8)
    a[0, 0] = -127
    terms = (a.float() * a.float())[0].cumsum(0)
    exact = (a.long() * a.long())[0].cumsum(0)
    assert torch.equal(terms[:1024].long(), exact[:1024])
    assert terms[1024].long() != exact[1024]


def test_matrices_of_another_type_or_of_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="two int8 matrices are needed"):
        integer_matmul(levels(2, 3).float(), levels(3, 2))
    with pytest.raises(ValueError, match="two int8 matrices are needed"):
        integer_matmul(levels(2, 3), levels(3))
    with pytest.raises(ValueError, match="as many as the rows of the second"):
        integer_matmul(levels(2, 3), levels(2, 3))


def test_a_kernel_that_saturates_pairs_of_products_is_found_out_and_not_used():
    """oneDNN limited to AVX2 is such a kernel on x86; elsewhere the setting has no effect."""
    program = (
        "import torch; from compresskit.integer import integer_matmul\n"
        "a = torch.full((4, 64), 127, dtype=torch.int8)\n"
        "assert (integer_matmul(a, a.T) == 127 * 127 * 64).all()\n"
        "g = torch.Generator().manual_seed(0)\n"
        "a, b = (torch.randint(-128, 128, (40, 600), dtype=torch.int8, generator=g)"
        " for _ in range(2))\n"
        "assert torch.equal(integer_matmul(a, b.T).long(), a.long() @ b.T.long())\n"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)


@pytest.mark.parametrize(("t", "n", "m"), [(1, 1, 1), (16, 8, 8), (17, 9, 31), (40, 64, 65)])
def test_padding_meets_the_restrictions_of_the_cuda_kernel_and_changes_no_entry(t, n, m):
    a, b = levels(t, n), levels(n, m, seed=1)
    wide, deep = integer._padded(a, b)
    assert len(wide) > 16
    assert wide.shape[1] % 8 == deep.shape[1] % 8 == 0
    assert deep.T.is_contiguous()
    assert torch.equal((wide.long() @ deep.long())[:t, :m], a.long() @ b.long())


# --- rounding inputs ----------------------------------------------------------------------------


def test_every_input_is_within_half_a_step_and_the_largest_uses_the_last_level():
    x = torch.randn(50, 64, generator=generator())
    for quantized in (quantize_tokens(x), quantize_tensor(x)):
        q, scale = quantized
        assert q.dtype == torch.int8
        assert ((x - q * scale).abs() <= scale / 2 * (1 + 1e-4)).all()  # 127 in float32
        assert q.int().abs().max() >= 127


def test_the_step_of_127_never_uses_minus_128_and_is_wider():
    x = torch.randn(50, 64, generator=generator())
    q, scale = quantize_tokens(x, steps=127)
    assert q.min() == -127
    assert (scale > quantize_tokens(x)[1]).all()


def test_rows_of_a_batch_affect_each_other_only_under_one_scale():
    x = torch.randn(4, 64, generator=generator())
    loud = x.clone()
    loud[0] *= 1000
    assert torch.equal(quantize_tokens(x)[0][1:], quantize_tokens(loud)[0][1:])
    assert not quantize_tensor(loud)[0][1:].any()
    fixed = quantize_tensor(x)[1][:1, 0]
    assert torch.equal(quantize_tensor(x, fixed)[0][1:], quantize_tensor(loud, fixed)[0][1:])


def test_zero_and_tiny_inputs_become_zero_without_a_division_by_zero():
    for tiny in (0.0, 1e-42):
        for quantize in (quantize_tokens, quantize_tensor):
            q, scale = quantize(torch.full((2, 3), tiny))
            assert not q.any()
            assert scale.isfinite().all()
    assert quantize_tensor(torch.zeros(0, 3))[0].shape == (0, 3)


# --- the node -----------------------------------------------------------------------------------


@pytest.fixture
def weight():
    return torch.randn(12, 37, generator=generator())


@pytest.fixture
def x():
    return torch.randn(20, 37, generator=generator(1))


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("inputs", integer.INPUTS)
@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(8, symmetric=True),
        QuantSpec(8),
        QuantSpec(4),
        QuantSpec(8, group_size="tensor"),
        QuantSpec(2, symmetric=True, group_size=37),
    ],
    ids=str,
)
def test_the_product_is_that_of_the_decoded_factors(inputs, spec, weight, x):
    code = int8(weight + 0.3, InputStats.of(x), inputs=inputs, spec=spec)
    q, scale = quantize_tokens(x)
    if inputs != "token":
        q, scale = quantize_tensor(x)  # the static scale is that of these inputs too
    bias = torch.arange(12.0)
    expected = (q * scale).double() @ code.decode().double().T + bias
    product = code.product(x, bias)
    assert relative(product, expected) < 1e-6  # rescaled in float32, rounded nowhere before


@pytest.mark.parametrize("method", [int8, partial(int8, inputs="tensor"), llm_int8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_of_any_shape_and_type_come_back_in_it(method, dtype, weight, x):
    code = method(weight)
    y = code.product(x.to(dtype).reshape(2, 5, 2, 37))
    assert y.dtype == dtype
    assert y.shape == (2, 5, 2, 12)
    assert torch.equal(y.reshape(20, 12), code.product(x.to(dtype)))
    assert code.product(x[0].to(dtype)).shape == (12,)
    assert code.product(x[:0].to(dtype)).shape == (0, 12)


@pytest.mark.parametrize("inputs", integer.INPUTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other_unless_they_share_a_scale(
    inputs, bad, weight, x
):
    code = int8(weight, InputStats.of(x), inputs=inputs)
    spoiled = x.clone()
    spoiled[3, 5] = bad
    y = code.product(spoiled)
    assert not y[3].isfinite().any()
    others = torch.arange(20) != 3
    if inputs == "tensor":
        assert not y[others].isfinite().any()
    else:
        assert torch.equal(y[others], code.product(x)[others])


def test_rounding_passes_no_gradient_rather_than_a_wrong_one(weight, x):
    assert not int8(weight).product(x.requires_grad_()).requires_grad


def test_another_number_of_inputs_is_refused(weight):
    with pytest.raises(ValueError, match=r"inputs of shape \(3, 5\) for 37 columns"):
        int8(weight).product(torch.zeros(3, 5))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"weight": Array(torch.zeros(2, 3))}, "needs a Quantized weight"),
        ({"inputs": "row"}, "it must be"),
        ({"inputs": "static"}, "it must be"),
        ({"input_scale": Array(torch.ones(1))}, "it must be"),
        ({"inputs": "static", "input_scale": Array(torch.ones(2))}, "it must be"),
        ({"inputs": "static", "input_scale": Bits.of(torch.ones(1), 8)}, "it must be"),
        ({"inputs": ["token"]}, "it must be"),
        ({"threshold": -1.0}, "a number above 0, such as 6.0"),
        ({"threshold": "6"}, "a number above 0, such as 6.0"),
        ({"threshold": 6.0, "inputs": "tensor"}, "a number above 0, such as 6.0"),
        ({"steps": 128}, "at most 127.5"),
        ({"steps": None}, "at most 127.5"),
    ],
)
def test_fields_that_are_something_else_are_refused(change, match, weight):
    with pytest.raises(ValueError, match=match):
        replace(int8(weight), **change)


@pytest.mark.parametrize("spec", [QuantSpec(8, group_size=5), QuantSpec(9)], ids=str)
def test_groups_and_more_bits_are_refused(spec, weight):
    with pytest.raises(ValueError, match="one scale per row or in all"):
        int8(weight, spec=spec)


def test_so_many_inputs_that_an_int32_could_overflow_are_refused():
    at_most = torch.zeros(1, integer.MOST_INPUTS)
    at_most[0, 0] = -1  # asymmetric: the levels are 255 from the zero point
    code = int8(at_most - 1, spec=QuantSpec(8))
    x = torch.full((1, integer.MOST_INPUTS), -1.0)
    assert relative(code.product(x), x.double() @ code.decode().double().T) < 0.005
    with pytest.raises(ValueError, match="65794 inputs; an int32 holds the sums of up to 65793"):
        int8(torch.ones(1, integer.MOST_INPUTS + 1))


# --- in a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [int8, partial(int8, inputs="static"), llm_int8])
def test_a_model_multiplies_by_it_and_survives_a_file_and_decoding(method, x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 16), nn.ReLU(), nn.Linear(16, 3))
    small = compress(model, {"0": method}, {"0": InputStats.of(x)})
    code = small[0].code
    expected = model[2](model[1](code.product(x, model[0].bias)))
    assert torch.equal(small(x), expected)
    assert torch.equal(decoded(small)(x), expected)  # no dense layer computes this
    container.save(small, tmp_path / "m")
    again = container.load(tmp_path / "m", model)
    assert torch.equal(again(x), expected)
    assert again[0].code.nbytes == code.nbytes == sum(code.size_table().values())


def test_a_layer_in_half_precision_computes_in_it(weight, x):
    layer = nn.Linear(37, 12)
    small = compress(nn.Sequential(layer), {"0": int8}).half()
    y = small(x.half())
    assert y.dtype == torch.float16
    # 8-bit inputs and weights, float16 in and out
    assert relative(y, layer(x).detach()) < 0.02


def test_convolutions_and_tables_are_refused_with_what_to_do():
    for layer in (nn.Conv2d(2, 3, 2), nn.Embedding(3, 8)):
        with pytest.raises(ValueError, match="quantizes its inputs"):
            layers.compressed(layer, int8(layers.as_matrix(layer)))


def test_its_size_is_one_byte_per_weight_and_the_scales(weight, x):
    assert int8(weight).nbytes == 12 * 37 + 12 * 2 + 1
    assert int8(weight, InputStats.of(x), inputs="static").nbytes == 12 * 37 + 12 * 2 + 1 + 4
    assert llm_int8(weight).nbytes == 12 * 37 + 12 * 4 + 1


# --- the methods --------------------------------------------------------------------------------


def test_the_weight_is_that_of_rounding_to_nearest(weight):
    spec = QuantSpec(8, symmetric=True)
    assert torch.equal(int8(weight).decode(), round_to_nearest(weight, spec=spec).decode())


def test_static_inputs_have_the_scale_of_the_largest_input_seen(weight, x):
    code = int8(weight, InputStats.of(x), inputs="static")
    assert code.input_scale.decode().item() == pytest.approx(x.abs().max().item() / 127.5)
    beyond = torch.full((1, 37), 10 * x.abs().max().item())
    assert torch.equal(code.product(beyond), code.product(beyond * 2))  # clipped


@pytest.mark.parametrize(
    ("stats", "match"),
    [
        (None, "need the largest inputs seen"),
        (InputStats.isotropic(37), "need the largest inputs seen"),
        (InputStats.of(torch.ones(3, 36)), "statistics of 36 inputs"),
        (replace(InputStats.of(torch.ones(3, 37)), max_abs=torch.full((37,), torch.nan)), "not kn"),
    ],
)
def test_static_inputs_without_known_maxima_are_refused(stats, match, weight):
    with pytest.raises(ValueError, match=match):
        int8(weight, stats, inputs="static")


@pytest.mark.parametrize("method", [int8, llm_int8])
def test_bad_weights_are_refused_and_zero_rows_stay_zero(method, x):
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            method(torch.full((2, 37), bad))
    for shape in ((0, 3), (3, 0), (3,), (2, 2, 2)):
        with pytest.raises(ValueError, match="a non-empty matrix is needed"):
            method(torch.ones(shape))
    rows = torch.ones(3, 37)
    rows[1], rows[:, 4] = 0, 0
    assert torch.equal(method(rows).decode()[1], torch.zeros(37))
    assert torch.equal(method(rows).product(x)[:, 1], torch.zeros(20))
    assert not method(rows).decode()[:, 4].any()


def test_a_threshold_that_is_no_number_from_0_on_is_refused(weight):
    for threshold in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="it must be 0 or more, for instance 6"):
            llm_int8(weight, threshold=threshold)


def test_the_outlier_columns_are_those_that_reach_the_threshold(weight, x):
    inputs = x.clamp(-3, 3)
    inputs[7, 20] = -6.0  # at the threshold itself, in one token of twenty
    code = llm_int8(weight)
    # the scale also sees what is left of the column, as in the reference
    scale = inputs.where(inputs.abs() < 6, 0).abs().amax(1, keepdim=True) / 127
    rest = inputs.clone()
    rest[:, 20] = 0
    rounded = torch.round(rest / scale) * scale
    expected = rounded @ code.decode().T + inputs[:, 20:21] @ code.decode()[:, 20:21].T
    assert relative(code.product(inputs), expected) < 1e-5
    assert relative(llm_int8(weight, threshold=6.1).product(inputs), expected) > 1e-3


def test_without_outliers_it_is_the_product_per_token(weight, x):
    code = llm_int8(weight, threshold=100.0)
    assert torch.equal(code.product(x), llm_int8(weight, threshold=0.0).product(x))


# --- against the references ---------------------------------------------------------------------


def test_llm_int8_has_the_levels_and_scales_of_bitsandbytes():
    code = llm_int8(reference("weight").half())
    assert torch.equal(code.weight.levels.decode() - 128, reference("llm_levels").int())
    assert torch.equal(code.weight.scale.tensor[:, 0], reference("llm_largest") / 127)


@pytest.mark.parametrize("threshold", [0, 3, 6])
def test_llm_int8_computes_what_bitsandbytes_computes(threshold):
    code = llm_int8(reference("weight").half(), threshold=threshold)
    y = code.product(reference("llm_x"))
    assert relative(y, reference(f"llm_y_{threshold}")) < 1e-3  # float16 outputs
    plain = reference("llm_x").float() @ reference("weight").T
    assert relative(y, plain) > 0.01  # and it is not the product without rounding


def test_dynamic_int8_computes_what_torchao_computes():
    code = int8_exact(reference("weight"))
    assert torch.equal(code.weight.scale.tensor, reference("ao_scale"))
    off = code.weight.levels.decode() - 128 - reference("ao_levels").int()
    ties = code.weight.levels.decode() <= 1  # -127.5: torchao multiplies by 1/scale
    assert not off[~ties].any()
    assert off.abs().max() <= 1
    same = Integer(
        replace(code.weight, levels=Bits.of(reference("ao_levels").int() + 128, 8)), "token"
    )
    bias = torch.arange(32) / 256
    y = same.product(reference("x").float(), bias)
    assert relative(y, reference("ao_y")) < 1e-6


def test_the_weight_levels_are_those_of_torchs_own_dynamic_quantization():
    grid = fit_grid(reference("weight"), QuantSpec(8, symmetric=True), scale_dtype=torch.float32)
    off = grid.nearest(reference("weight")) - 128 - reference("dynamic_levels").int()
    torch.testing.assert_close(
        grid.scale[:, 0].double(), reference("dynamic_scale"), rtol=1e-6, atol=0
    )
    assert (off != 0).sum() <= 32  # at most the largest weight of each row, between two levels
    assert off.abs().max() <= 1


def test_autocast_coarsens_neither_integers_nor_hot_columns(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 48, generator=generator), torch.randn(5, 48, generator=generator)
    x[2, 7] = 100
    code = llm_int8(weight)
    for native in (True, False):
        monkeypatch.setattr(integer, "_native_is_exact", lambda device, native=native: native)
        with torch.autocast("cpu", torch.bfloat16):
            inside = code.product(x)
        assert torch.equal(inside, code.product(x))


@pytest.mark.parametrize("quantize", [quantize_tokens, quantize_tensor])
def test_inputs_that_are_no_matrix_and_steps_beyond_int8_are_refused(quantize):
    for shape, steps in (((2, 3, 4), 127), ((3, 4), 0), ((3, 4), 200)):
        with pytest.raises(ValueError, match=r"give \(tokens, n\)"):
            quantize(torch.ones(shape), steps=steps)
