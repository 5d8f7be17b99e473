"""Chapter 13: every theorem against a computation that does not use it, and false variants."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn
from torch.nn import functional as F

from compresskit import show
from compresskit.train import fewer, masked, unmasked


def rejects(check, *false_variant):
    with pytest.raises(AssertionError):
        check(*false_variant)


# --- a unit and its scale ------------------------------------------------------------------------


def network(seed=0, masks=False):
    """Two hidden layers, two deep in ReLUs, with exact zeros where a mask is asked for."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)
    ).double()
    if masks:
        for layer in (net[0], net[2]):
            layer.weight.data *= torch.rand(layer.weight.shape) < 0.5
    x, y = torch.randn(20, 5).double(), torch.randint(3, (20,))
    return net, x, y


def gradients(net, x, y):
    net.zero_grad()
    F.cross_entropy(net(x), y).backward()
    return net


def sides(net, values, first=0):
    """Sums of values(p) over what comes into each unit, its bias included, and what goes out."""
    into, out = net[first], net[first + 2]
    inwards = values(into.weight).sum(1) + values(into.bias)
    return inwards.detach(), values(out.weight).sum(0).detach()


def check_saliency(inwards):
    for seed, first in itertools.product(range(3), (0, 2)):
        net = gradients(*network(seed))
        _, outwards = sides(net, lambda p: p * p.grad, first)
        assert torch.allclose(inwards(net, first), outwards, atol=1e-13)  # a sum of 140 products


@pytest.mark.theorem("thm-lottery-balance")
def test_weight_times_gradient_is_the_same_on_both_sides_of_a_unit():
    check_saliency(lambda net, first: sides(net, lambda p: p * p.grad, first)[0])


@pytest.mark.false_variant("thm-lottery-balance")
def test_without_the_bias_the_two_sides_differ():
    def weights_alone(net, first):
        weight = net[first].weight
        return (weight * weight.grad).sum(1).detach()

    rejects(check_saliency, weights_alone)


def check_step(masks, gained):
    rate = 0.3
    for seed in range(3):
        net, x, y = network(seed, masks)
        gradients(net, x, y)
        kept = [p != 0 for p in net.parameters()]
        for p, mask in zip(net.parameters(), kept, strict=True):
            p.grad *= mask
        before = sides(net, torch.square)
        slopes = sides(net, lambda p: p.grad**2)
        with torch.no_grad():
            for p in net.parameters():
                p -= rate * p.grad
        after = sides(net, torch.square)
        change = (after[0] - after[1]) - (before[0] - before[1])
        assert torch.allclose(change, gained(rate, *slopes), atol=1e-13)


@pytest.mark.theorem("thm-lottery-balance")
@pytest.mark.parametrize("masks", [False, True])
def test_a_step_changes_the_balance_by_the_squares_of_the_gradients_alone(masks):
    check_step(masks, lambda rate, into, out: rate**2 * (into - out))


@pytest.mark.false_variant("thm-lottery-balance")
def test_a_step_does_not_leave_the_balance_as_it_is():
    rejects(check_step, False, lambda rate, into, out: torch.zeros_like(into))


@pytest.mark.theorem("thm-lottery-balance")
def test_scales_choose_whether_a_mask_spares_a_unit_and_the_function_does_not_notice():
    net, x, _ = network()
    for unit, c in itertools.product(range(7), (2.0**-20, 2.0**20)):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[0].weight[unit] *= c
            other[0].bias[unit] *= c
            other[2].weight[:, unit] /= c
        assert torch.allclose(other(x), net(x), atol=1e-13)
        for count in (5, 30):  # n weights go, and n stay
            full = {"": torch.ones(7, 5, dtype=torch.bool)}
            mask = fewer({"": other[0].weight.detach()}, full, rate=count / 35)[""]
            assert mask[unit].any() == (c > 1)
            assert mask[unit].all() == (c > 1)


# --- a lottery that can be solved ----------------------------------------------------------------


def flow(a, v, time=60.0):
    """The end of gradient flow of the toy, by an integrator that knows nothing of the theorem."""
    a, v = np.asarray(a, float), np.asarray(v, float)

    def slope(_, state):
        a, v = np.split(state, 2)
        missing = {side: (v * np.maximum(side * a, 0)).sum() - 1 for side in (1, -1)}
        da, dv = np.zeros_like(a), np.zeros_like(v)
        for side, miss in missing.items():
            on = side * a > 0
            da -= miss / 2 * v * on * side
            dv -= miss / 2 * np.maximum(side * a, 0)
        return np.concatenate([da, dv])

    end = integrate.solve_ivp(slope, (0, time), np.concatenate([a, v]), rtol=1e-9, atol=1e-11)
    a, v = np.split(end.y[:, -1], 2)
    loss = sum(((v * np.maximum(side * a, 0)).sum() - 1) ** 2 for side in (1, -1)) / 4
    return a, v, loss


def signs(p, q):
    return np.array([1.0] * p + [-1.0] * q)


def wins(a):
    return flow(a, np.zeros(len(a)))[2] < 1e-6


@pytest.mark.theorem("thm-lottery-toy")
def test_no_unit_changes_its_side_and_both_sides_are_needed():
    rng = np.random.default_rng(0)
    for p, q in [(0, 3), (3, 0), (1, 1), (1, 4), (3, 2)]:
        start = signs(p, q) * rng.uniform(0.3, 2, p + q)
        a, v, loss = flow(start, np.zeros(p + q))
        assert (np.sign(a) == np.sign(start)).all()
        assert np.allclose(a**2 - v**2, start**2, atol=1e-6)
        assert loss < 1e-6 if p and q else loss >= 0.25 - 1e-9
        assert (np.abs(a) >= np.abs(start) - 1e-7).all()


def check_chance(formula):
    for m in (2, 3, 4):
        tried = [wins(np.array(coins)) for coins in itertools.product((1.0, -1.0), repeat=m)]
        assert np.mean(tried) == formula(m)


@pytest.mark.theorem("thm-lottery-toy")
def test_a_wide_network_wins_unless_all_coins_fall_alike():
    check_chance(lambda m: 1 - 2.0 ** (1 - m))


@pytest.mark.false_variant("thm-lottery-toy")
def test_it_is_not_one_coin_that_must_fall_well():
    rejects(check_chance, lambda m: 1 - 2.0**-m)


def iterated(start):
    a = start
    while len(a) > 2:
        _, v, _ = flow(a, np.zeros(len(a)))
        a = np.delete(a, np.abs(v).argmin())
    return wins(a)


def once(start):
    _, v, _ = flow(start, np.zeros(len(start)))
    return wins(start[np.argsort(-np.abs(v), kind="stable")[:2]])


SPLITS = [(1, 2), (2, 3), (2, 4), (3, 2), (1, 4)]


def check_rounds(one_shot_wins):
    for p, q in SPLITS:
        assert iterated(signs(p, q))
        assert once(signs(p, q)) == one_shot_wins(p, q)


@pytest.mark.theorem("thm-lottery-toy")
def test_iterating_always_wins_and_one_shot_only_with_a_lonely_unit():
    check_rounds(lambda p, q: min(p, q) == 1)


@pytest.mark.false_variant("thm-lottery-toy")
def test_one_shot_is_not_as_good_as_iterating():
    rejects(check_rounds, lambda p, q: True)


@pytest.mark.theorem("thm-lottery-toy")
def test_the_controls_of_the_toy_win_as_often_as_stated():
    two = list(itertools.product((1.0, -1.0), repeat=2))
    assert np.mean([wins(np.array(coins)) for coins in two]) == 0.5
    assert all(wins(np.array([size, -1 / size])) for size in (0.2, 0.7, 3.0))
    for p, q in SPLITS:
        pairs = list(itertools.combinations(signs(p, q), 2))
        won = np.mean([wins(np.array(pair)) for pair in pairs])
        assert won == pytest.approx(2 * p * q / ((p + q) * (p + q - 1)))


# --- what a mask leaves --------------------------------------------------------------------------


def single():
    net, x, y = network()
    return net.float(), x.float(), y


def optimized(model, x, y, make, steps=25):
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return model


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


class Few(nn.Module):
    """The network of `network`, with only the kept weights of its first layer as parameters."""

    def __init__(self, net, mask):
        super().__init__()
        self.mask, self.rest = mask, net[1:]
        self.bias = nn.Parameter(net[0].bias.detach().clone())
        self.few = nn.Parameter(net[0].weight.detach()[mask].clone())

    def forward(self, x):
        weight = torch.zeros(self.mask.shape, dtype=x.dtype)
        return self.rest(F.linear(x, weight.masked_scatter(self.mask, self.few), self.bias))


@pytest.mark.theorem("prop-lottery-subnetwork")
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_masked_network_trains_like_one_that_has_only_the_kept_weights(make):
    net, x, y = single()
    mask = torch.rand(7, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    few = optimized(Few(copy.deepcopy(net), mask), x, y, make)
    for filling in (0.0, 1e3):
        start = copy.deepcopy(net)
        with torch.no_grad():
            start[0].weight[~mask] = filling
        held = unmasked(optimized(masked(start, {"0": mask}), x, y, make))
        assert torch.allclose(held[0].weight[mask], few.few, atol=1e-5)  # float32, 25 steps
        assert (held[0].weight[~mask] == 0).all()
        assert torch.allclose(held[4].weight, few.rest[3].weight, atol=1e-5)
    loose = copy.deepcopy(net)  # removed at the start and not held at 0
    with torch.no_grad():
        loose[0].weight[~mask] = 0
    loose = optimized(loose, x, y, make)
    assert not torch.allclose(loose[0].weight[mask], few.few, atol=1e-4)


@pytest.mark.theorem("prop-lottery-subnetwork")
def test_a_unit_that_feeds_nothing_has_no_influence():
    net, x, y = single()
    mask = torch.ones(6, 7, dtype=torch.bool)
    mask[:, 3] = False
    ends = []
    for value in (0.1, -50.0):
        start = copy.deepcopy(net)
        with torch.no_grad():
            start[0].weight[3] = value
        ends.append(optimized(masked(start, {"2": mask}), x, y, OPTIMIZERS["momentum"])[4].weight)
    assert torch.equal(*ends)


# --- what a ticket costs -------------------------------------------------------------------------


@pytest.mark.theorem("prop-lottery-cost")
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.33])
@pytest.mark.parametrize("count", [1000, 23, 8192])
def test_the_counts_of_rounds_are_near_a_geometric_sequence(share, count):
    weights = torch.arange(1.0, count + 1).view(1, -1)
    masks = {"": torch.ones(1, count, dtype=torch.bool)}
    for r in range(1, 12):
        try:
            masks = fewer({"": weights}, masks, rate=share)
        except ValueError:
            break  # no weight would be left
        assert abs(int(masks[""].sum()) - count * (1 - share) ** r) <= 1 / (2 * share)


@pytest.mark.theorem("prop-lottery-cost")
def test_the_stored_tickets_have_the_counts_and_the_price_of_the_formula():
    record = next(r for r in show.stored("13_lottery") if r["arm"] == "ticket" and "kept" in r)
    full = record["kept"][0]
    for r, kept in enumerate(record["kept"]):
        for share, k, n in zip((0.2, 0.2, 0.1), kept, full, strict=True):
            assert abs(k - n * (1 - share) ** r) <= 1 / (2 * share)
    paid = sum(kept[1] for kept in record["kept"]) / full[1]
    assert paid == pytest.approx((1 - 0.8**19) / 0.2, abs=19 * 2.5 / full[1])
    assert math.ceil(math.log(0.1) / math.log(0.8)) == 11
    assert 0.8**11 <= 0.1 < 0.8**10


# --- overlap by chance ---------------------------------------------------------------------------


@pytest.mark.theorem("prop-lottery-overlap")
def test_the_overlap_of_a_drawn_mask_has_the_stated_mean_and_variance():
    def check(variance):
        for n, first, second in [(6, 2, 3), (7, 4, 4), (5, 5, 2), (6, 1, 1)]:
            places = itertools.combinations(range(n), second)
            shared = [sum(i < first for i in chosen) for chosen in places]
            assert np.mean(shared) == pytest.approx(first * second / n)
            assert np.var(shared) == pytest.approx(variance(n, first, second))

    def stated(n, a, b):
        return a * b / n * (n - a) * (n - b) / (n * (n - 1))

    check(stated)
    rejects(check, lambda n, a, b: a * (b / n) * (1 - b / n))  # as if drawn with repetition
    law = stats.hypergeom(8192, 1374, 1374)
    assert law.var() == pytest.approx(stated(8192, 1374, 1374))


# --- random weights hold every weight ------------------------------------------------------------


def worst(sums):
    """The largest distance from a point of [-1/2, 1/2] to its nearest sum, exactly."""
    sums = np.sort(sums)
    middle = (sums[1:] + sums[:-1]) / 2
    z = np.append(middle[np.abs(middle) <= 0.5], [-0.5, 0.5])
    place = np.searchsorted(sums, z)
    near = sums[np.maximum(place - 1, 0)], sums[np.minimum(place, len(sums) - 1)]
    return np.minimum(np.abs(z - near[0]), np.abs(z - near[1])).max()


def all_sums(x):
    sums = np.zeros(1)
    for value in x:
        sums = np.concatenate([sums, sums + value])
    return sums


@pytest.mark.theorem("thm-lottery-subset")
def test_the_covered_part_grows_by_half_of_covered_times_uncovered():
    rng = np.random.default_rng(0)
    for _ in range(10):
        size = 400  # cells of [-1/2, 1/2]
        covered = np.zeros(size, bool)
        for _ in range(rng.integers(1, 6)):  # a few intervals, as in the proof
            start, length = rng.integers(0, size), rng.integers(1, 80)
            covered[start : start + length] = True
        grown = []
        for shift in range(-size, size):  # X uniform on the lattice of [-1, 1)
            moved = np.zeros(size, bool)
            source = covered[max(0, -shift) : size - max(0, shift)]
            moved[max(0, shift) : max(0, shift) + len(source)] = source
            grown.append((moved & ~covered).mean())
        u = covered.mean()
        assert np.mean(grown) == pytest.approx(u * (1 - u) / 2, rel=1e-12)


def check_potential(factor):
    """E phi(u_t) <= factor * phi(u) for intervals, by integration over X."""
    for u in (0.01, 0.1, 0.3, 0.6, 0.9):
        x = (np.arange(200_000) + 0.5) / 100_000 - 1  # midpoints in [-1, 1]
        # D = [-u/2, u/2]; its shift by x, cut to J, adds what lies outside D
        low, high = np.maximum(x - u / 2, -0.5), np.minimum(x + u / 2, 0.5)
        shared = np.clip(np.minimum(high, u / 2) - np.maximum(low, -u / 2), 0, None)
        added = np.clip(high - low, 0, None) - shared
        assert np.mean(1 / (u + added) - 1) <= factor * (1 / u - 1) * (1 + 1e-6)


@pytest.mark.theorem("thm-lottery-subset")
def test_the_potential_falls_by_a_quarter():
    check_potential(0.75)


@pytest.mark.false_variant("thm-lottery-subset")
def test_the_potential_does_not_fall_by_a_third():
    rejects(check_potential, 2 / 3)


@pytest.mark.theorem("thm-lottery-subset")
def test_sums_of_random_weights_cover_the_interval_as_often_as_promised():
    rng = np.random.default_rng(1)
    for eta, n in ((1.0, 4), (0.5, 9), (0.3, 12)):
        bound = 2 / eta**2 * 0.75**n
        failed = [worst(all_sums(rng.uniform(-1, 1, n))) > eta for _ in range(200)]
        assert np.mean(failed) <= bound
    assert bound < 1  # the last of them says something


def check_necessary(least):
    rng = np.random.default_rng(2)
    for n in range(1, 9):
        best = (np.arange(2**n) + 0.5) / 2**n - 0.5  # evenly placed: the best that can be
        eta = worst(best)
        assert n >= least(eta) - 1e-9
        for _ in range(20):
            assert n >= least(worst(all_sums(rng.uniform(-1, 1, n)))) - 1e-9


@pytest.mark.theorem("thm-lottery-subset")
def test_fewer_numbers_than_the_bits_of_the_error_cannot_do():
    check_necessary(lambda eta: math.log2(1 / (2 * eta)))


@pytest.mark.false_variant("thm-lottery-subset")
def test_one_number_more_is_not_always_needed():
    rejects(check_necessary, lambda eta: math.log2(1 / (2 * eta)) + 1)


@pytest.mark.false_variant("thm-lottery-subset")
def test_one_kept_weight_is_not_enough():
    """The bound of the theorem, for sets of at most one weight."""

    def check(sums):
        rng = np.random.default_rng(3)
        failed = [worst(sums(rng.uniform(-1, 1, 40))) > 0.02 for _ in range(40)]
        assert np.mean(failed) <= 2 / 0.02**2 * 0.75**40

    rejects(check, lambda x: np.append(x, 0.0))
    check(lambda x: all_sums(x[:15]))  # a part of the sums is enough


@pytest.mark.theorem("cor-lottery-layer")
def test_a_layer_of_parallel_random_weights_holds_a_given_layer():
    rng, k, eta = np.random.default_rng(4), 14, 0.05
    target = rng.uniform(-0.5, 0.5, (3, 4))
    places = np.array(list(itertools.product((0, 1), repeat=k)))
    pruned = np.empty_like(target)
    for place in np.ndindex(*target.shape):
        sums = places @ rng.uniform(-1, 1, k)
        pruned[place] = sums[np.abs(sums - target[place]).argmin()]
    x = rng.normal(size=(4, 200))
    assert np.abs(pruned - target).max() <= eta
    assert (np.abs((pruned - target) @ x) <= eta * np.abs(x).sum(0)).all()
    # the stated k makes the bound on failing at most delta, and one less does not
    size, delta = 12, 0.01
    k = math.ceil(math.log(2 * size / (eta**2 * delta)) / math.log(4 / 3))
    assert size * 2 / eta**2 * 0.75**k <= delta < size * 2 / eta**2 * 0.75 ** (k - 1)
