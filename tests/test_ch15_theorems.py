"""Chapter 15: every theorem against a computation that does not use it, and false variants."""

import itertools

import numpy as np
import pytest
import torch

from compresskit import linalg, theory
from compresskit.lowrank import allocated_ranks, largest_rank
from compresskit.methods import svd, whitened_svd
from compresskit.stats import InputStats


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def moments(n, seed=0):
    x = draw(300, n, seed=seed) @ draw(n, n, seed=seed + 1)
    return InputStats.of(x.float())


def descended(weight, root, rank, seed=0):
    """The least |(W - AB) L|^2 over thin factors that LBFGS finds: no decomposition."""
    left, right = draw(len(weight), rank, seed=seed), draw(rank, weight.shape[1], seed=seed + 1)
    factors = [left.requires_grad_(), right.requires_grad_()]
    optimizer = torch.optim.LBFGS(factors, max_iter=2000, line_search_fn="strong_wolfe")

    def error():
        optimizer.zero_grad()
        value = ((weight - left @ right) @ root).square().sum()
        value.backward()
        return value

    optimizer.step(error)
    return error().item()


# --- the nearest matrix -------------------------------------------------------------------------


@pytest.mark.theorem("lem-svd-weyl")
def test_singular_values_of_a_sum():
    for seed in range(5):
        a, b = draw(7, 5, seed=seed), draw(7, 5, seed=seed + 50) * (seed + 0.5)
        sums, ones, others = (torch.linalg.svdvals(m) for m in (a + b, a, b))
        for i, j in itertools.product(range(5), repeat=2):
            if i + j < 5:
                assert sums[i + j] <= ones[i] + others[j] + 1e-12
        assert (sums > ones + others[4] + 1e-9).any()  # not with any smaller term of the sum


def check_truncation(rule):
    """`rule` (singular values, rank) -> (squared error, spectral error) of the best."""
    for seed, rank in itertools.product(range(3), (1, 2, 3)):
        weight = draw(6, 5, seed=seed)
        singular = torch.linalg.svdvals(weight)
        squared, spectral = rule(singular, rank)
        found = descended(weight, torch.eye(5).double(), rank)
        assert found == pytest.approx(float(squared), rel=1e-4)
        delta = (
            weight - svd(weight, rank=min(rank, largest_rank(6, 5)), dtype=torch.float32).decode()
        )
        if rank <= largest_rank(6, 5):
            assert torch.linalg.matrix_norm(delta, 2).item() == pytest.approx(
                float(spectral), rel=1e-4
            )


@pytest.mark.theorem("thm-svd-eckart")
def test_no_matrix_of_rank_k_is_nearer():
    check_truncation(theory.truncation)
    for seed in range(20):  # every singular value of the error, for any M
        weight, other = draw(6, 5, seed=seed), draw(6, 2, seed=seed + 9) @ draw(2, 5, seed=seed)
        errors, values = (torch.linalg.svdvals(m) for m in (weight - other, weight))
        assert (errors[:3] >= values[2:] - 1e-12).all()
    tied = torch.diag(torch.tensor([2.0, 1.0, 1.0])).double()
    for keep in (1, 2):  # a tie has two nearest matrices
        other = tied.clone()
        other[keep, keep] = 0
        assert (tied - other).square().sum() == theory.truncation([2.0, 1.0, 1.0], 2).squared


@pytest.mark.false_variant("thm-svd-eckart")
def test_other_triples_and_other_norms_are_rejected():
    rejects(check_truncation, lambda s, k: (s[1:].square().sum() - s[1:k].square().sum(), s[1]))
    rejects(check_truncation, lambda s, k: (s[:-k].square().sum(), s[0]))
    rejects(check_truncation, lambda s, k: (s[k:].square().sum(), s[k:].square().sum().sqrt()))
    eye = torch.eye(2)  # the largest entry of the error is not least for the truncation
    assert (eye - 0.5).abs().max() < (eye - torch.diag(torch.tensor([1.0, 0.0]))).abs().max()


def check_whitened(rule):
    """`rule` (weight, second moments, rank) -> least squared error of the outputs."""
    for seed, rank in itertools.product(range(3), (1, 2)):
        weight, second = draw(6, 5, seed=seed), moments(5, seed).second.double()
        root = torch.linalg.cholesky(second)
        assert descended(weight, root, rank) == pytest.approx(
            float(rule(weight, second, rank)), rel=1e-4
        )


def whitened(weight, second, rank):
    values = torch.linalg.svdvals(weight @ torch.linalg.cholesky(second))
    return theory.truncation(values, rank).squared


@pytest.mark.theorem("thm-svd-whitened")
def test_the_least_error_of_the_outputs():
    check_whitened(whitened)
    weight, stats = draw(12, 17).float(), moments(17)
    second = stats.damped(1e-4).double()
    ours = whitened_svd(weight, stats, rank=4, dtype=torch.float32).decode().double()
    values, vectors = torch.linalg.eigh(second)
    for root in (vectors * values.sqrt(), vectors * values.sqrt() @ vectors.T):
        left, s, right = torch.linalg.svd(weight.double() @ root, full_matrices=False)
        other = (left[:, :4] * s[:4]) @ right[:4] @ torch.linalg.inv(root)
        torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-4)


@pytest.mark.false_variant("thm-svd-whitened")
def test_the_plain_truncation_the_diagonal_and_the_moments_themselves_are_rejected():
    def plain(weight, second, rank):
        left, s, right = torch.linalg.svd(weight, full_matrices=False)
        delta = weight - (left[:, :rank] * s[:rank]) @ right[:rank]
        return ((delta @ second) * delta).sum()

    def diagonal(weight, second, rank):
        return whitened(weight, torch.diag(second.diagonal()), rank)

    def squared_moments(weight, second, rank):
        return theory.truncation(torch.linalg.svdvals(weight @ second), rank).squared

    for variant in (plain, diagonal, squared_moments):
        rejects(check_whitened, variant)


@pytest.mark.theorem("cor-svd-inner")
def test_the_left_factors_inputs_are_uncorrelated():
    weight, stats = draw(12, 17).float(), moments(17)
    code = whitened_svd(weight, stats, rank=4, dtype=torch.float32)
    second = stats.damped(1e-4).double()
    right, left = code.right.decode().double(), code.left.decode().double()
    values = torch.linalg.svdvals(weight.double() @ linalg.cholesky(second))[:4]
    inner = right @ second @ right.T
    torch.testing.assert_close(inner, torch.diag(values.square()), rtol=1e-3, atol=1e-3)
    error = draw(4, 17, seed=3)
    ours = (((left @ error) @ second) * (left @ error)).sum()
    assert ours.item() == pytest.approx(((error @ second) * error).sum().item(), rel=1e-5)


# --- numbers and budgets ------------------------------------------------------------------------


@pytest.mark.theorem("prop-svd-numbers")
def test_three_blocks_determine_a_matrix_of_rank_k():
    for m, n, k in ((6, 5, 2), (4, 9, 3), (5, 5, 1)):
        weight = draw(m, k) @ draw(k, n, seed=1)
        x, y, z = weight[:k, :k], weight[:k, k:], weight[k:, :k]
        rest = z @ torch.linalg.solve(x, y)
        torch.testing.assert_close(rest, weight[k:, k:])
        numbers = x.numel() + y.numel() + z.numel()
        assert numbers == theory.degrees_of_freedom(m, n, k) == k * (m + n) - k * k
        assert (k * (m + n) < m * n) == (k <= largest_rank(m, n))
        # The tangent space has as many dimensions: left and right factors moved freely.
        a, b = draw(m, k), draw(k, n, seed=1)
        moved = [torch.outer(e, b[j]) for j in range(k) for e in torch.eye(m).double()]
        moved += [torch.outer(a[:, j], e) for j in range(k) for e in torch.eye(n).double()]
        rank = torch.linalg.matrix_rank(torch.stack(moved).flatten(1))
        assert rank == numbers


def greedy(spectra, costs, numbers):
    """The proposition, word for word: stop at the first rank that the budget does not allow."""
    ranks = [0] * len(spectra)
    while True:
        waiting = [i for i, values in enumerate(spectra) if ranks[i] < len(values)]
        if not waiting:
            return ranks, numbers
        first = max(waiting, key=lambda i: spectra[i][ranks[i]] ** 2 / costs[i])
        if costs[first] > numbers:
            return ranks, numbers
        numbers -= costs[first]
        ranks[first] += 1


@pytest.mark.theorem("prop-svd-ranks")
def test_greedy_ranks_are_optimal_where_nothing_is_left_over():
    def kept(ranks):
        return sum((values[:r] ** 2).sum() for values, r in zip(spectra, ranks, strict=True))

    rng, hits = np.random.default_rng(0), 0
    for _ in range(20):
        costs = rng.integers(1, 4, size=3)
        spectra = [np.sort(rng.exponential(size=5))[::-1] * rng.uniform(0.5, 2) for _ in costs]
        for numbers in range(1, 20):
            ranks, left = greedy(spectra, costs, numbers)
            fitting = [
                choice
                for choice in itertools.product(range(6), repeat=3)
                if np.dot(choice, costs) <= numbers
            ]
            best = max(map(kept, fitting))
            if not left:
                hits += 1
                assert kept(ranks) == pytest.approx(best)
            else:
                assert kept(ranks) <= best + 1e-12
    assert hits > 50
    ours = allocated_ranks(
        {"a": torch.tensor([9.0, 1.0, 0.1]), "b": torch.tensor([4.0, 3.0, 2.0])},
        dict.fromkeys("ab", (9, 9)),
        numbers=72,
    )
    assert list(ours.values()) == greedy([[9.0, 1.0, 0.1], [4.0, 3.0, 2.0]], [18, 18], 72)[0]


# --- random ranges ------------------------------------------------------------------------------


@pytest.mark.theorem("lem-svd-inverse")
def test_the_mean_square_of_the_inverse():
    rng = np.random.default_rng(0)
    for k, p in ((3, 4), (5, 8)):
        inverse = np.linalg.pinv(rng.normal(size=(20_000, k, k + p)))
        squares = (inverse**2).sum((1, 2))
        assert squares.mean() == pytest.approx(k / (p - 1), abs=5 * squares.std() / 20_000**0.5)


def check_range(rule):
    """`rule` (singular values, k, p) bounds the mean error, and is exact for a spike and noise."""
    k, p, n = 2, 3, 40
    # One direction so strong that all others only enter through the inverse of a Gaussian.
    singular = np.array([1e6, 1e6] + [1.0] * (n - 2))
    matrix = torch.diag(torch.from_numpy(singular))
    errors = []
    for seed in range(600):
        basis = linalg.range_finder(matrix, k + p, power=0, seed=seed)
        errors.append((matrix - basis @ (basis.T @ matrix)).square().sum().item())
    bound, mean = float(rule(singular, k, p)), np.mean(errors)
    assert mean <= bound
    assert bound <= 2 * (n - 2) * (1 + k / (p - 1)) / 2 + 1e-6  # not an empty statement


@pytest.mark.theorem("thm-svd-range")
def test_the_mean_error_of_a_random_range():
    check_range(theory.random_range)
    matrix = draw(30, 40)
    singular = torch.linalg.svdvals(matrix)
    for k, p in ((2, 6), (4, 4), (6, 2)):
        errors = []
        for seed in range(100):
            basis = linalg.range_finder(matrix, k + p, power=0, seed=seed)
            errors.append((matrix - basis @ (basis.T @ matrix)).square().sum().item())
        assert np.mean(errors) <= theory.random_range(singular, k, p)


@pytest.mark.false_variant("thm-svd-range")
def test_the_best_rank_the_rank_of_all_columns_and_a_looser_claim_are_rejected():
    def best(singular, k, p):
        return theory.truncation(singular, k + p).squared

    def spectral(singular, k, p):
        return (1 + k / (p - 1)) * theory.truncation(singular, k).spectral ** 2

    def too_loose(singular, k, p):
        return (1 + k * p) * theory.truncation(singular, k).squared

    for variant in (best, spectral, too_loose):
        rejects(check_range, variant)


@pytest.mark.theorem("prop-svd-power")
def test_a_basis_that_is_good_for_the_power_is_good_for_the_matrix():
    norm = torch.linalg.matrix_norm
    for seed, q in itertools.product(range(6), (0, 1, 3)):
        a = draw(9, 7, seed=seed)
        basis = torch.linalg.qr(draw(9, 3, seed=seed + 70)).Q
        rest = torch.eye(9).double() - basis @ basis.T
        power = torch.linalg.matrix_power(a @ a.T, q) @ a
        assert norm(rest @ a, 2) <= norm(rest @ power, 2) ** (1 / (2 * q + 1)) * (1 + 1e-12)
    skew = draw(9, 9)  # not for an oblique projector
    skew = skew @ torch.diag(torch.tensor([1.0] * 4 + [0.0] * 5).double()) @ torch.linalg.inv(skew)
    small = torch.diag(torch.linspace(1, 0.1, 9)).double()
    power = torch.linalg.matrix_power(small @ small.T, 2) @ small
    assert norm(skew @ small, 2) > norm(skew @ power, 2) ** (1 / 5)


@pytest.mark.theorem("prop-svd-noise")
def test_the_energy_that_a_rank_takes_from_noise():
    for m, n, r in ((40, 40, 2), (30, 90, 5)):
        taken = [
            torch.linalg.svdvals(draw(m, n, seed=seed))[:r].square().sum().item()
            for seed in range(60)
        ]
        limit = r * ((m**0.5 + n**0.5) ** 2 + 1)
        assert 0.6 * limit < np.mean(taken) <= limit
        assert theory.noise_share(m, n, r) == pytest.approx((limit - r) / (m * n))
