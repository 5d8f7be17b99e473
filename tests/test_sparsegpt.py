"""SparseGPT, Wanda and magnitude: the references' masks, down-dating, and what they refuse."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from compresskit import linalg
from compresskit.affine import QuantSpec
from compresskit.methods import gptq, magnitude, obs, round_to_nearest, sparsegpt, wanda
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats

# What the authors' code (IST-DASLab/sparsegpt, commit 147d215; locuslab/wanda, commit 8e8fc87)
# makes of 32 rows of a layer of 512 correlated inputs, one of them (77) always zero.
DATA = Path(__file__).parent / "data"
LAYER, SPARSEGPT, WANDA = (np.load(DATA / f"{name}.npz") for name in ("gptq", "sparsegpt", "wanda"))
COUNT = 32 * 128  # weights in a block of their default size
PATTERNS = {
    "s50": Pattern(0.5, among="layer"),
    "s70": Pattern(0.7, among="layer"),
    "2of4": Pattern.n_of_m(2, 4),
    "4of8": Pattern.n_of_m(4, 8),
}
TWO_FOUR = PATTERNS["2of4"]


def reference_layer():
    rows, columns = torch.triu_indices(512, 512)
    second = torch.zeros(512, 512)
    second[rows, columns] = torch.from_numpy(LAYER["second"])
    return torch.from_numpy(LAYER["weight"]), moments(second.triu(1).T + second)


def moments(second):
    return InputStats(1, second, torch.ones(len(second)), torch.ones(len(second)))


def with_their_count(pattern):
    """In each block they remove what is <= the entry number int(s N) + 1: one more than s N."""
    if pattern.among != "layer":
        return pattern
    return Pattern((int(COUNT * pattern.sparsity) + 1) / COUNT, among="layer")


def mask_of(file, name):
    return torch.from_numpy(np.unpackbits(file[name]).reshape(32, 512)).bool()


def output_error(weight, code, stats):
    return (stats.distortion(weight - code.decode()) / stats.distortion(weight)).item()


@pytest.fixture
def layer():
    """(weight, stats) of 16 rows and 48 correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 48, generator=generator) @ torch.randn(48, 48, generator=generator)
    x *= torch.linspace(0.2, 3, 48)[torch.randperm(48, generator=generator)]
    return torch.randn(16, 48, generator=generator), InputStats.of(x)


# --- against the references ---------------------------------------------------------------------


@pytest.mark.parametrize("name", PATTERNS)
def test_its_masks_and_values_are_those_of_the_reference(name):
    weight, stats = reference_layer()
    code = sparsegpt(weight, stats, pattern=with_their_count(PATTERNS[name]))
    kept = mask_of(SPARSEGPT, f"kept_{name}")
    assert torch.equal(code.mask.decode().bool(), kept)
    expected = torch.from_numpy(SPARSEGPT[f"values_{name}"])
    torch.testing.assert_close(code.decode()[:16][kept[:16]], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["s50", "s70"])
def test_without_the_weight_more_per_block_few_masks_differ_and_none_before_that_weight(name):
    # Each of four blocks keeps one weight that they remove; what follows in its row may change.
    weight, stats = reference_layer()
    code = sparsegpt(weight, stats, pattern=PATTERNS[name])
    kept = code.mask.decode().bool()
    differ = kept != mask_of(SPARSEGPT, f"kept_{name}")
    assert differ[:, :128].sum() == 1
    assert 4 <= differ.sum() <= 40
    assert kept.sum() == round((1 - PATTERNS[name].sparsity) * kept.numel())


@pytest.mark.parametrize("name", ["s50", "s70", "2of4", "4of8", "s50_b4", "2of4_b4"])
def test_its_error_is_that_of_the_reference(name):
    weight, stats = reference_layer()
    spec = QuantSpec(4) if name.endswith("_b4") else None
    pattern = PATTERNS[name.removesuffix("_b4")]
    code = sparsegpt(weight, stats, pattern=pattern, spec=spec, scale_dtype=torch.float32)
    assert output_error(weight, code, stats) <= 1.005 * SPARSEGPT[f"error_{name}"]


@pytest.mark.parametrize("name", ["s50_b4", "2of4_b4"])
def test_pruned_and_rounded_its_levels_are_those_of_the_reference(name):
    weight, stats = reference_layer()
    pattern = with_their_count(PATTERNS[name.removesuffix("_b4")])
    code = sparsegpt(weight, stats, pattern=pattern, spec=QuantSpec(4), scale_dtype=torch.float32)
    decoded = code.decode()
    unpacked = np.unpackbits(SPARSEGPT[f"levels_{name}"]).reshape(-1, 4) @ [8, 4, 2, 1]
    ours = (decoded / code.scale.decode() + code.zero.decode()).round().flatten().numpy()
    # As in test_gptq.py: the reference's float32 and ours part at ties.
    assert np.mean(ours == unpacked) >= 0.99
    assert ((decoded != 0) == mask_of(SPARSEGPT, f"kept_{name}")).double().mean() >= 0.99


@pytest.mark.parametrize("name", PATTERNS)
def test_wandas_masks_are_those_of_the_reference(name):
    # Theirs compares within a row, and no two of these scores in a row are equal.
    weight, stats = reference_layer()
    pattern = PATTERNS[name]
    if pattern.among == "layer":
        pattern = Pattern(pattern.sparsity)
    code = wanda(weight, stats, pattern=pattern)
    kept = mask_of(WANDA, f"wanda_{name}")
    assert torch.equal(code.mask.decode().bool(), kept)
    assert torch.equal(code.decode(), weight * kept)


@pytest.mark.parametrize("name", PATTERNS)
def test_magnitudes_masks_are_those_of_the_same_authors(name):
    # Across the layer they remove what is <= entry number int(s N) + 1, again one more or none.
    weight, _ = reference_layer()
    pattern = PATTERNS[name]
    if pattern.among == "layer":
        count = weight.numel()
        pattern = Pattern((int(count * pattern.sparsity) + 1) / count, among="layer")
    code = magnitude(weight, pattern=pattern)
    assert torch.equal(code.mask.decode().bool(), mask_of(WANDA, f"magnitude_{name}"))


def test_another_score_is_noticed_by_these_comparisons():
    weight, stats = reference_layer()
    kept = mask_of(WANDA, "wanda_2of4")
    squared = TWO_FOUR.mask(weight.abs() * stats.second.diagonal())
    assert (squared != kept).double().mean() > 0.01
    kept = mask_of(SPARSEGPT, "kept_2of4")
    not_updated = wanda(weight, stats, pattern=TWO_FOUR).mask.decode().bool()
    assert (not_updated != kept).double().mean() > 0.01


# --- against the definition ---------------------------------------------------------------------


def down_dating(weight, stats, pattern, *, block=128, spec=None, update=True, early=False):
    """SparseGPT from the definition, float64: before each step an inverse over what is still free.

    `update=False` is the well-known mistake, the inverse of all columns throughout; `early=True`
    another one: all weights that go are chosen before anything is corrected.
    """
    work = weight.double().clone()
    second = stats.second.double()
    columns = len(second)
    second = second + 0.01 * second.diagonal().mean() * torch.eye(columns)
    inverses = [torch.linalg.inv(second[i:, i:]) for i in range(columns)]
    if not update:
        inverses = [inverses[0][i:, i:] for i in range(columns)]
    price = torch.stack([1 / inverse[0, 0] for inverse in inverses])
    size = pattern.among if isinstance(pattern.among, int) else block
    kept = torch.ones_like(work, dtype=torch.bool)
    for i in range(columns):
        if i % size == 0:
            part = slice(i, min(i + size, columns))
            source = weight.double() if early else work
            kept[:, part] = pattern.mask(source[:, part].square() * price[part])
        value = work[:, i] * kept[:, i]
        error = (value - work[:, i])[:, None]
        work[:, i + 1 :] += error * inverses[i][0, 1:] / inverses[i][0, 0]
        work[:, i] = value
    return work, kept


DEFINED = [
    (Pattern(0.5), 128),
    (Pattern(0.5), 16),
    (Pattern(0.75, among="layer"), 12),
    (TWO_FOUR, 128),
    (Pattern.n_of_m(1, 3), 7),
    (Pattern.n_of_m(4, 7), 128),
]


@pytest.mark.theorem("thm-oneshot-sparsegpt")
@pytest.mark.parametrize(("pattern", "block"), DEFINED, ids=str)
def test_it_is_explicit_down_dating_of_the_inverse(pattern, block, layer):
    expected, kept = down_dating(*layer, pattern, block=block)
    code = sparsegpt(*layer, pattern=pattern, block=block)
    # No two costs that are compared here are equal in float32.
    assert torch.equal(code.mask.decode().bool(), kept)
    torch.testing.assert_close(code.decode().double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.false_variant("thm-oneshot-sparsegpt")
@pytest.mark.parametrize("mistake", [{"update": False}, {"early": True}], ids=str)
def test_a_stale_inverse_or_stale_weights_are_noticed_although_they_beat_wanda(mistake, layer):
    weight, stats = layer
    pattern = Pattern.n_of_m(2, 8)
    wrong, kept = down_dating(*layer, pattern, **mistake)
    code = sparsegpt(*layer, pattern=pattern)
    assert (code.mask.decode().bool() != kept).double().mean() > 0.01
    error = (stats.distortion(weight - wrong) / stats.distortion(weight)).item()
    assert output_error(weight, code, stats) < error
    assert error < output_error(weight, wanda(weight, stats, pattern=pattern), stats)


@pytest.mark.parametrize("pattern", [Pattern(0.5), TWO_FOUR], ids=str)
def test_what_stays_has_answered_to_all_that_went_before_it(pattern, layer):
    """In the coordinates V^T delta an error stands where a weight went, and nothing else."""
    weight, stats = layer
    factor = linalg.upper_factor(stats.damped(0.01))

    def share_where_kept(code):
        part = ((code.decode().double() - weight.double()) @ factor).square()
        return (part[code.mask.decode().bool()].sum() / part.sum()).item()

    assert share_where_kept(sparsegpt(weight, stats, pattern=pattern)) < 1e-9
    assert share_where_kept(wanda(weight, stats, pattern=pattern)) > 0.1
    assert share_where_kept(obs(weight, stats, pattern=pattern)) > 0.01  # earlier ones answer too


@pytest.mark.parametrize("spec", [None, QuantSpec(4)], ids=str)
@pytest.mark.parametrize("pattern", [TWO_FOUR, Pattern.n_of_m(1, 3), Pattern.n_of_m(4, 8)], ids=str)
def test_for_n_of_m_blocks_change_nothing_but_speed(pattern, spec, layer):
    one, *others = (
        sparsegpt(*layer, pattern=pattern, block=block, spec=spec).decode() for block in (1, 5, 128)
    )
    for other in others:
        assert ((one - other).abs() < 1e-4).double().mean() >= 0.99  # sums in another order


@pytest.mark.parametrize("among", ["row", "layer"])
def test_otherwise_a_block_is_what_is_compared(among, layer):
    pattern = Pattern(0.5, among=among)
    masks = [sparsegpt(*layer, pattern=pattern, block=b).mask.decode() for b in (8, 16, 128)]
    assert all(mask.sum() == 16 * 24 for mask in masks)
    for mask, block in zip(masks, (8, 16, 48), strict=True):
        shares = mask.reshape(16, -1, block).sum((0, 2) if among == "layer" else 2)
        assert (shares == shares.flatten()[0]).all()
    assert not torch.equal(masks[0], masks[2])
    # With one block there is nothing to correct before the choice: it is made on the given weights.
    weight, stats = layer
    price = linalg.upper_factor(stats.damped(0.01)).diagonal().float().square()
    assert torch.equal(masks[2].bool(), pattern.mask(weight.square() * price))


@pytest.mark.parametrize("among", ["row", "layer", 4])
def test_all_or_nothing_is_zeros_or_the_given_weights(among, layer):
    weight, stats = layer
    nothing, all_ = (
        sparsegpt(weight, stats, pattern=Pattern(s, among=among)).decode() for s in (0.0, 1.0)
    )
    assert torch.equal(nothing, weight)
    assert not all_.any()


@pytest.mark.parametrize(
    "spec", [QuantSpec(4), QuantSpec(3, symmetric=True), QuantSpec(4, group_size=10)], ids=str
)
def test_if_nothing_goes_it_is_gptq(spec, layer):
    code = sparsegpt(*layer, pattern=Pattern(0.0), spec=spec)
    expected = gptq(*layer, spec=spec, static_groups=True).decode()
    assert ((code.decode() - expected).abs() < 1e-5).double().mean() >= 0.99


def test_rows_are_pruned_as_if_alone_unless_the_layer_is_compared(layer):
    weight, stats = layer
    for pattern, equal in ((Pattern(0.5), True), (TWO_FOUR, True), (PATTERNS["s50"], False)):
        together = sparsegpt(weight, stats, pattern=pattern).decode()
        alone = torch.cat([sparsegpt(row[None], stats, pattern=pattern).decode() for row in weight])
        close = ((together - alone).abs() < 1e-4).all().item()
        assert close is equal


@pytest.mark.parametrize("pattern", [Pattern(0.5), PATTERNS["s50"], TWO_FOUR], ids=str)
def test_it_beats_wanda_and_wanda_beats_magnitude_on_inputs_of_many_sizes(pattern, layer):
    weight, stats = layer
    error = [
        output_error(weight, method(weight, stats, pattern=pattern), stats)
        for method in (sparsegpt, wanda, magnitude)
    ]
    assert error[0] < 0.95 * error[1]
    assert error[1] < 0.9 * error[2]


def test_rounding_in_the_same_pass_beats_rounding_afterwards(layer):
    weight, stats = layer
    spec = QuantSpec(3)
    joint = sparsegpt(weight, stats, pattern=TWO_FOUR, spec=spec)
    pruned = sparsegpt(weight, stats, pattern=TWO_FOUR)
    rounded = round_to_nearest(pruned.decode(), spec=spec).decode()
    rounded = Sparse.of(rounded, pruned.mask.decode().bool())
    assert output_error(weight, joint, stats) < 0.95 * output_error(weight, rounded, stats)


def test_rounding_kept_values_to_half_precision_is_an_error_that_is_absorbed_too(layer):
    """So a kept weight errs by half a unit in its last place, 2^-8 of it, and by nothing else."""
    weight, stats = layer
    factor = linalg.upper_factor(stats.damped(0.01))

    def errs(code):
        steps = (code.decode().double() - weight.double()) @ factor / factor.diagonal()
        kept = code.mask.decode().bool()
        return (steps.abs() / (2**-8 * code.decode().double().abs()))[kept].max().item()

    own = sparsegpt(weight, stats, pattern=TWO_FOUR, dtype=torch.bfloat16)
    whole = sparsegpt(weight, stats, pattern=TWO_FOUR)
    cast = Sparse.of(whole.decode(), whole.mask.decode().bool(), dtype=torch.bfloat16)
    assert own.nbytes == cast.nbytes
    assert errs(own) <= 1.001
    assert errs(cast) > 1.5


def test_only_kept_levels_are_stored(layer):
    code = sparsegpt(*layer, pattern=TWO_FOUR, spec=QuantSpec(4))
    sizes = code.size_table()
    assert sizes["levels.values"] == 16 * 24 * 4 / 8
    assert sizes["levels.mask"] <= 16 * 48 / 8


@pytest.mark.parametrize("pattern", [Pattern(0.25), TWO_FOUR], ids=str)
def test_dead_inputs_go_first_and_change_nothing_else(pattern, layer):
    weight, stats = layer
    dead = [3, 17]
    second = stats.second.clone()
    second[dead], second[:, dead] = 0, 0
    code = sparsegpt(weight, moments(second), pattern=pattern)
    assert not code.mask.decode()[:, dead].any()
    assert torch.isfinite(code.decode()).all()
    other = weight.clone()
    other[:, dead] = 100.0
    assert torch.equal(sparsegpt(other, moments(second), pattern=pattern).decode(), code.decode())


def test_the_units_of_the_inputs_do_not_matter(layer):
    weight, stats = layer
    a, b = (
        sparsegpt(weight, moments(stats.second * unit), pattern=TWO_FOUR) for unit in (1, 2**-20)
    )
    assert torch.equal(a.decode(), b.decode())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_for_their_values(dtype, layer):
    weight, stats = layer
    half = weight.to(dtype)
    for method in (sparsegpt, wanda):
        a, b = (method(w, stats, pattern=TWO_FOUR) for w in (half, half.float()))
        assert torch.equal(a.decode(), b.decode())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_masks_are_the_same(layer):
    weight, stats = layer
    for pattern in (Pattern(0.5), PATTERNS["s50"], TWO_FOUR):
        code = sparsegpt(weight.cuda(), stats, pattern=pattern)
        assert code.decode().is_cuda
        expected = sparsegpt(weight, stats, pattern=pattern).mask.decode()
        assert (code.mask.decode().cpu() == expected).double().mean() >= 0.99


def test_bad_input_is_refused_by_name(layer):
    weight, stats = layer
    run = partial(sparsegpt, pattern=TWO_FOUR)
    with pytest.raises(ValueError, match=r"shape \(48,\)"):
        run(weight[0], stats)
    with pytest.raises(ValueError, match=r"InputStats.isotropic\(47\)"):
        run(weight[:, 1:], stats)
    for block in (0, 2.5):
        with pytest.raises(ValueError, match="for instance 128"):
            run(weight, stats, block=block)
    with pytest.raises(ValueError, match="0 or more"):
        run(weight, stats, damp=-1)
    with pytest.raises(ValueError, match="second moments hold NaN"):
        run(weight, moments(stats.second * torch.nan))
    with pytest.raises(ValueError, match=r"like Pattern\(0.5\)"):
        sparsegpt(weight, stats, pattern=Pattern(0.5, among="layer", unit="column"))
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(2))
    with pytest.raises(ValueError, match=r"damped\(matrix, 0.01\)"):
        run(weight, InputStats.of(x), damp=0.0)
    assert torch.isfinite(run(weight, InputStats.of(x)).decode()).all()
    with pytest.raises(ValueError, match="moments of 48 inputs"):
        wanda(weight[:, 1:], stats, pattern=TWO_FOUR)
    weight[0, 0] = torch.inf
    for method in (sparsegpt, wanda, magnitude):
        with pytest.raises(ValueError, match="weight holds NaN"):
            method(weight, stats, pattern=TWO_FOUR)
