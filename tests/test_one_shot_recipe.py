"""The experiment of one-shot pruning does what its names say."""

import pytest
import torch

from compresskit.affine import Quantized, QuantSpec
from compresskit.methods import magnitude, round_to_nearest
from compresskit.recipes import one_shot
from compresskit.sparse import Pattern, Sparse
from compresskit.stats import InputStats


@pytest.fixture
def weight():
    return torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def stats(weight):
    mixing = torch.randn(300, 40, generator=torch.Generator().manual_seed(1))
    return InputStats.of(mixing.cumsum(1))


@pytest.mark.parametrize("criterion", [*one_shot.CRITERIA, "SparseGPT, layer"])
@pytest.mark.parametrize(("pattern", "share"), [("50 %", 0.5), ("60 %", 0.6), ("70 %", 0.7)])
def test_a_named_pattern_removes_its_share(weight, stats, criterion, pattern, share):
    code = one_shot.prune(criterion, pattern)(weight, stats)
    assert isinstance(code, Sparse)
    assert code.values.tensor.dtype == torch.float16
    assert int((~code.kept).sum()) == round(share * weight.numel())
    equal_rows = len(set(code.kept.sum(1).tolist())) == 1
    assert equal_rows == (criterion != "SparseGPT, layer")


def test_two_of_four_are_two_of_each_four(weight, stats):
    for criterion in one_shot.CRITERIA:
        kept = one_shot.prune(criterion, "2:4")(weight, stats).kept
        assert (kept.view(6, 10, 4).sum(2) == 2).all()


def test_a_group_of_four_is_not_compared_as_a_layer():
    with pytest.raises(ValueError, match="lose a share"):
        one_shot.prune("SparseGPT, layer", "2:4")


def test_rounding_in_the_same_pass_errs_less_than_afterwards(weight, stats):
    joint = one_shot.prune("SparseGPT", "50 %", bits=3)(weight, stats)
    after = one_shot.prune("SparseGPT", "50 %", bits=3, joint=False)(weight, stats)
    assert joint.nbytes == after.nbytes
    assert stats.distortion(weight - joint.decode()) < stats.distortion(weight - after.decode())


def test_rounding_afterwards_keeps_the_mask_and_takes_the_nearest_points(weight):
    method = one_shot.CRITERIA["magnitude"](pattern=Pattern(0.5))
    code = one_shot.rounded(weight, None, method=method, spec=QuantSpec(4))
    assert isinstance(code, Quantized)
    mask = magnitude(weight, pattern=Pattern(0.5)).kept
    assert torch.equal(code.levels.kept, mask)
    kept = method(weight, None).decode()
    assert torch.equal(code.decode(), round_to_nearest(kept, spec=QuantSpec(4)).decode() * mask)
