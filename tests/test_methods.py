"""The contract that every method keeps. A new method is one line in METHODS."""

import copy
import inspect
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from compresskit import affine, container, methods
from compresskit.affine import QuantSpec
from compresskit.code import Code, packed
from compresskit.entropy import adaptive, coded, huffman, rans
from compresskit.methods import (
    awq,
    block_format,
    entropy_gptq,
    fp4,
    gptq,
    hadamard,
    int8,
    kmeans,
    llm_int8,
    lloyd_max,
    magnitude,
    nf4,
    obq,
    obs,
    random,
    randomized_svd,
    residual,
    round_to_nearest,
    sign,
    smooth,
    sparsegpt,
    svd,
    ternary,
    wanda,
    water_filling_gptq,
    whitened_svd,
)
from compresskit.model import compress
from compresskit.sparse import Pattern
from compresskit.stats import InputStats

METHODS = {
    "int8": partial(round_to_nearest, spec=QuantSpec(8, symmetric=True)),
    "int4 groups": partial(round_to_nearest, spec=QuantSpec(4, group_size=10)),
    "int3 mse": partial(round_to_nearest, spec=QuantSpec(3, group_size=16), fit=affine.mse),
    "int5 percentile": partial(round_to_nearest, spec=QuantSpec(5), fit=affine.percentile),
    "int2 tensor": partial(round_to_nearest, spec=QuantSpec(2, group_size="tensor")),
    "sign": partial(round_to_nearest, spec=QuantSpec(1, symmetric=True), fit=affine.mse),
    "integers per token": partial(int8),
    "integers per tensor": partial(int8, inputs="tensor", spec=QuantSpec(8, group_size="tensor")),
    "llm_int8": partial(llm_int8, threshold=3.0),
    "int16": partial(round_to_nearest, spec=QuantSpec(16), scale_dtype=torch.float32),
    "obq": partial(obq, spec=QuantSpec(4, group_size=10)),
    "gptq rows": partial(gptq, spec=QuantSpec(8, symmetric=True)),
    "gptq mse": partial(gptq, spec=QuantSpec(3, group_size=16), fit=affine.mse),
    "gptq groups": partial(gptq, spec=QuantSpec(4, group_size=10), order="activation"),
    "gptq static groups": partial(
        gptq, spec=QuantSpec(4, group_size=10), order="activation", static_groups=True
    ),
    "lloyd_max": partial(lloyd_max),
    "lloyd_max blocks": partial(lloyd_max, bits=3, share="row", block=10),
    "lloyd_max 6 bits": partial(lloyd_max, bits=6),
    "kmeans": partial(kmeans, bits=2, start="density"),
    "nf4": partial(nf4),
    "nf4 single": partial(nf4, block=16, double_quant=False),
    "fp4": partial(fp4, block=10),
    "awq groups": partial(awq, spec=QuantSpec(4, group_size=10)),
    "awq clipped": partial(awq, spec=QuantSpec(3, group_size=16), clip=True),
    "rotated": partial(hadamard, method=partial(round_to_nearest, spec=QuantSpec(4))),
    "rotated gptq": partial(hadamard, method=partial(gptq, spec=QuantSpec(4)), seed=1),
    "smoothed integers": partial(smooth, method=int8),
    "blocks Q4_K": partial(block_format),
    "blocks Q6_K": partial(block_format, type="Q6_K"),
    "blocks Q5_1": partial(block_format, type="Q5_1"),
    "one bit": partial(sign),
    "one bit integers": partial(sign, inputs="token"),
    "ternary": partial(ternary),
    "ternary integers": partial(ternary, inputs="token"),
    "ternary least squares": partial(ternary, scale="least squares"),
    "random": partial(random, pattern=Pattern(0.5)),
    "magnitude": partial(magnitude, pattern=Pattern(0.5)),
    "magnitude 2:4": partial(magnitude, pattern=Pattern.n_of_m(2, 4)),
    "magnitude layer": partial(magnitude, pattern=Pattern(0.9, among="layer")),
    "magnitude half": partial(magnitude, pattern=Pattern(0.5), dtype=torch.float16),
    "magnitude rows": partial(magnitude, pattern=Pattern(0.5, among="layer", unit="row")),
    "wanda": partial(wanda, pattern=Pattern(0.5)),
    "wanda 2:4": partial(wanda, pattern=Pattern.n_of_m(2, 4)),
    "sparsegpt": partial(sparsegpt, pattern=Pattern(0.5)),
    "sparsegpt layer": partial(sparsegpt, pattern=Pattern(0.9, among="layer"), block=100),
    "sparsegpt 2:4": partial(sparsegpt, pattern=Pattern.n_of_m(2, 4), block=10),
    "obs": partial(obs, pattern=Pattern(0.5)),
    "obs 2:4": partial(obs, pattern=Pattern.n_of_m(2, 4)),
    "sparsegpt int4": partial(sparsegpt, pattern=Pattern(0.5), spec=QuantSpec(4, group_size=10)),
    "svd": partial(svd, rank=5, dtype=torch.float32),
    "svd half": partial(svd, rank=9),
    "svd int8": partial(svd, rank=5, factors=partial(round_to_nearest, spec=QuantSpec(8))),
    "randomized_svd": partial(randomized_svd, rank=5, dtype=torch.float32),
    "whitened_svd": partial(whitened_svd, rank=5, dtype=torch.float32),
    "whitened_svd half": partial(whitened_svd, rank=5),
    "whitened_svd int4": partial(
        whitened_svd, rank=5, factors=partial(gptq, spec=QuantSpec(4), fit=affine.mse)
    ),
    "rank 2 and int4": partial(
        residual,
        first=partial(svd, rank=2, dtype=torch.float32),
        second=partial(round_to_nearest, spec=QuantSpec(4, group_size=10)),
    ),
    "int3 and rank 2": partial(
        residual,
        first=partial(round_to_nearest, spec=QuantSpec(3, group_size=10)),
        second=partial(svd, rank=2, dtype=torch.float32),
        rounds=3,
    ),
}
METHODS |= {
    "entropy_gptq": partial(entropy_gptq, bits=8),
    "entropy_gptq shrunk": partial(entropy_gptq, bits=7, shrink=True),
    "water_filling_gptq": partial(water_filling_gptq, bits=8, shrink=False),
    "water_filling_gptq shrunk": partial(water_filling_gptq, bits=7),
}
# A matrix of one row or column is smaller than two factors.
FACTORED = {name for name in METHODS if "svd" in name or "rank" in name}
# Scales take more than a few weights are worth.
CODED = {name for name in METHODS if "entropy" in name or "filling" in name}
# Of many starts they keep the best: moments that differ in their last digit may prefer another,
# equally good to within a percent or so. Rounded factors may fall on the other side.
SEARCHES = {name for name in METHODS if name.startswith("blocks Q") and name.endswith("_K")}
SEARCHES |= CODED | {"whitened_svd half", "whitened_svd int4"}
# What each becomes when nothing is known of the inputs: (its reduction, tolerance in weights).
REDUCES_TO = {name: name for name in METHODS}  # rounding to nearest ignores the inputs
REDUCES_TO |= {"obq": "int4 groups"}
REDUCES_TO |= {"gptq rows": "int8", "gptq mse": "int3 mse"}
REDUCES_TO |= {"gptq groups": "int4 groups", "gptq static groups": "int4 groups"}
REDUCES_TO |= {"awq groups": "int4 groups"}
REDUCES_TO |= {"wanda": "magnitude", "wanda 2:4": "magnitude 2:4", "sparsegpt": "magnitude"}
REDUCES_TO |= {"obs": "magnitude", "obs 2:4": "magnitude 2:4"}
REDUCES_TO |= {"whitened_svd": "svd"}
REDUCES_TO |= {"water_filling_gptq": "entropy_gptq"}
REDUCES_TO |= {"water_filling_gptq shrunk": "entropy_gptq shrunk"}
REDUCES_TO |= {"sparsegpt layer": "magnitude layer", "sparsegpt 2:4": "magnitude 2:4"}


# Columns of the weights: block formats take whole blocks.
COLUMNS = dict.fromkeys(METHODS, 37) | {"blocks Q4_K": 256, "blocks Q6_K": 256, "blocks Q5_1": 64}


@pytest.fixture
def columns(name):
    return COLUMNS[name]


@pytest.fixture
def weight(columns):
    return torch.randn(12, columns, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def x(columns):
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(200, columns, generator=generator)
    return mixing @ torch.randn(columns, columns, generator=generator)


every = pytest.mark.parametrize("name", METHODS)


@every
def test_it_returns_a_code_of_the_weights_shape_that_is_closer_than_nothing(name, weight, x):
    code = METHODS[name](weight, InputStats.of(x))
    assert isinstance(code, Code)
    assert code.shape == weight.shape
    assert code.decode().dtype == torch.float32
    assert (weight - code.decode()).square().sum() < weight.square().sum()


@every
def test_it_changes_neither_weight_nor_statistics(name, weight, x):
    stats = InputStats.of(x)
    operands = weight, stats.second, stats.mean_abs, stats.max_abs
    copies = [tensor.clone() for tensor in operands]
    METHODS[name](weight, stats)
    assert all(map(torch.equal, operands, copies))


@every
def test_it_is_deterministic(name, weight, x):
    a, b = (METHODS[name](weight, InputStats.of(x)) for _ in range(2))
    assert [leaf.to_bytes() for leaf in a.leaves().values()] == [
        leaf.to_bytes() for leaf in b.leaves().values()
    ]


@every
def test_its_size_is_the_length_of_its_bytes_and_below_float32(name, weight, x):
    code = METHODS[name](weight, InputStats.of(x))
    assert code.nbytes == sum(len(leaf.to_bytes()) for leaf in code.leaves().values())
    assert code.nbytes < 4 * weight.numel()


@every
def test_it_survives_a_file(name, weight, x, tmp_path):
    layer = nn.Linear(weight.shape[1], 12)
    layer.weight.data = weight
    small = compress(layer, {"": METHODS[name]}, {"": InputStats.of(x)})
    container.save(small, tmp_path / "layer")
    again = container.load(tmp_path / "layer", layer)
    assert torch.equal(again(x), small(x))


@every
def test_the_batching_of_the_calibration_does_not_matter(name, weight, x):
    parts, whole = [InputStats.of(part) for part in x.split(37)], InputStats.of(x)
    merged = METHODS[name](weight, sum(parts[1:], start=parts[0])).decode()
    usual = METHODS[name](weight, whole).decode()
    if name in SEARCHES:
        a, b = (whole.distortion(weight - found).item() for found in (merged, usual))
        assert a == pytest.approx(b, rel=0.02)
    else:
        torch.testing.assert_close(merged, usual)


@every
def test_the_reduction_law(name, weight):
    isotropic = METHODS[name](weight, InputStats.isotropic(weight.shape[1])).decode()
    assert torch.equal(isotropic, METHODS[REDUCES_TO[name]](weight, None).decode())


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_strided_weights_are_taken_for_their_values(name, dtype, x):
    wide = torch.randn(x.shape[1], 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    strided = wide.T[::2]
    plain = strided.float().contiguous()
    stats = InputStats.of(x)
    assert torch.equal(METHODS[name](strided, stats).decode(), METHODS[name](plain, stats).decode())


@every
def test_a_matrix_of_one_row_or_one_column_is_accepted(name, columns):
    for shape in ((1, columns), (12, 1), (1, 1)) if columns == 37 else ((1, columns),):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        if name in FACTORED:
            with pytest.raises(ValueError, match="smaller than two factors"):
                METHODS[name](weight, InputStats.isotropic(shape[1]))
        elif name in CODED and weight.numel() <= 12:
            with pytest.raises(ValueError, match="scales and tables alone take more"):
                METHODS[name](weight, InputStats.isotropic(shape[1]))
        elif name in CODED:
            roomy = partial(METHODS[name], bits=16)
            assert roomy(weight, InputStats.isotropic(shape[1])).shape == shape
        else:
            assert METHODS[name](weight, InputStats.isotropic(shape[1])).shape == shape


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(name, weight, x, bad):
    weight[3, 5] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        METHODS[name](weight, InputStats.of(x))


def same_or_refused(name, weight, stats, usual, reason):
    """A method that uses `stats` refuses them; one that does not returns what it always does."""
    try:
        code = METHODS[name](weight, stats)
    except ValueError as error:
        return reason in str(error)
    return torch.equal(code.decode(), usual)


@every
@pytest.mark.parametrize("field", ["second", "mean_abs", "max_abs"])
def test_moments_that_are_not_finite_are_refused_or_not_used(name, field, weight, x):
    stats = InputStats.of(x)
    usual = METHODS[name](weight, stats).decode()
    broken = getattr(stats, field).clone()
    broken[4] = torch.nan
    assert same_or_refused(name, weight, replace(stats, **{field: broken}), usual, "finite")


@every
def test_moments_of_another_layer_are_refused_or_not_used(name, weight):
    stats = InputStats.of(torch.randn(50, 36, generator=torch.Generator().manual_seed(0)))
    assert same_or_refused(name, weight, stats, METHODS[name](weight, None).decode(), "36")


@every
def test_a_zero_matrix_and_zero_rows_and_columns_are_ordinary(name, weight, x):
    stats = InputStats.of(x)
    assert not METHODS[name](torch.zeros(weight.shape), stats).decode().any()
    weight[2], weight[:, 7] = 0, 0
    error = weight - METHODS[name](weight, stats).decode()
    assert error.square().sum() < weight.square().sum()


@every
def test_inputs_that_are_always_zero_do_no_harm(name, weight, x):
    x[:, [0, 9, 36]] = 0
    stats = InputStats.of(x)
    decoded = METHODS[name](weight, stats).decode()
    assert torch.isfinite(decoded).all()
    assert stats.distortion(weight - decoded) < stats.distortion(weight)
    nothing = InputStats.of(torch.zeros(9, x.shape[1]))
    assert torch.isfinite(METHODS[name](weight, nothing).decode()).all()


@every
def test_fewer_calibration_tokens_than_columns_are_enough(name, weight, x):
    for tokens in (1, 5):
        stats = InputStats.of(x[:tokens])
        decoded = METHODS[name](weight, stats).decode()
        assert torch.isfinite(decoded).all()
        assert stats.distortion(weight - decoded) < stats.distortion(weight)


@every
def test_half_precision_moments_are_accepted_and_autocast_makes_no_difference(name, weight, x):
    stats = InputStats.of(x)
    fields = {f: getattr(stats, f).bfloat16() for f in ("second", "mean_abs", "max_abs")}
    assert METHODS[name](weight, replace(stats, **fields)).shape == weight.shape
    trained = replace(stats, second=stats.second.clone().requires_grad_())
    assert METHODS[name](weight.clone().requires_grad_(), trained).shape == weight.shape
    layer = nn.Linear(weight.shape[1], 12)
    layer.weight.data = weight
    usual = compress(layer, {"": METHODS[name]}, {"": stats})
    with torch.autocast("cpu", torch.bfloat16):
        inside = compress(layer, {"": METHODS[name]}, {"": stats})
    assert torch.equal(inside.code.decode(), usual.code.decode())


@every
@pytest.mark.parametrize("rewrite", [rans, huffman, adaptive, packed], ids=lambda f: f.__name__)
def test_its_whole_numbers_can_be_coded_or_packed(name, rewrite, weight, x):
    code = METHODS[name](weight, InputStats.of(x))
    if rewrite is packed:
        if code.quantizes_inputs:  # these multiply whole numbers as they are
            return
        other = packed(code)
        assert other.nbytes == code.nbytes
    else:
        other = coded(code, rewrite)
        assert other.nbytes <= code.nbytes
    if name in FACTORED:  # a product of factors that lie elsewhere may round otherwise
        torch.testing.assert_close(other.decode(), code.decode(), rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(other.decode(), code.decode())
    torch.testing.assert_close(other.product(x[:3]), code.product(x[:3]), rtol=1e-3, atol=1e-3)


@every
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_gives_the_same_code_there(name, weight, x, tmp_path):
    layer = nn.Linear(weight.shape[1], 12)
    layer.weight.data = weight
    plan, stats = {"": METHODS[name]}, {"": InputStats.of(x)}
    usual, there = (compress(model, plan, stats) for model in (layer, copy.deepcopy(layer).cuda()))
    assert all(leaf.tensor.is_cuda for leaf in there.code.leaves().values())
    a, b = usual.code.decode(), there.code.decode().cpu()
    assert ((a - b).abs() <= 1e-5 * a.abs().max()).float().mean() >= 0.99  # ties may fall otherwise
    container.save(there, tmp_path / "layer")
    again = container.load(tmp_path / "layer", copy.deepcopy(layer).cuda())
    assert torch.equal(again(x.cuda()), there(x.cuda()))


def test_every_public_method_is_under_contract():
    tried = {method.func.__name__ for method in METHODS.values()}
    assert tried | {"masked"} == set(methods.__all__)  # a mask fits one shape: tests/test_sparse.py


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_has_the_common_signature(name):
    first, second, *options = inspect.signature(getattr(methods, name)).parameters.values()
    assert (first.name, second.name) == ("weight", "stats")
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
