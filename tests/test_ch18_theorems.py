"""Chapter 18: every theorem against a computation that does not use it, and false variants."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from compresskit import theory
from compresskit.code import Array, Bits
from compresskit.codebook import Codebook
from compresskit.train import shared_values


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


LAWS = {"gaussian": stats.norm(), "laplace": stats.laplace(scale=0.5**0.5)}


def exponent_entropy(law, shift):
    """Of floor(log2 |2^shift X|), from the distribution function alone."""
    edges = 2.0 ** (np.arange(-50, 12) - shift)
    mass = np.diff(2 * law.cdf(edges) - 1)
    return theory.entropy(mass / mass.sum())


def mean_over_shifts(law):
    return np.mean([exponent_entropy(law, t) for t in np.linspace(0, 1, 33)[:-1]])


def log_density(law, y):
    """The density of log2 |X|."""
    return 2 * law.pdf(2.0**y) * 2.0**y * math.log(2)


def differential_entropy(density):
    y = np.linspace(-45, 6, 60_001)
    f = density(y)
    return float(integrate.trapezoid(np.where(f > 0, -f * np.log2(f.clip(1e-300)), 0), y))


def smoothed(law):
    """The density of log2 |X| + U: what lies between y - 1 and y."""
    return lambda y: 2 * (law.cdf(2.0**y) - law.cdf(2.0 ** (y - 1)))


def check_mean(rule):
    """`rule` (law) -> the mean of H(E) over scales."""
    for law in LAWS.values():
        assert mean_over_shifts(law) == pytest.approx(rule(law), abs=2e-3)


@pytest.mark.theorem("thm-lossless-exponent")
def test_the_entropy_of_an_exponent():
    check_mean(lambda law: differential_entropy(smoothed(law)))
    for name, law in LAWS.items():
        for shift in (0.0, 0.3, 0.71):
            h = exponent_entropy(law, shift)
            assert exponent_entropy(law, shift + 1) == pytest.approx(h, abs=1e-9)
            cells = theory.exponent_law(2.0**shift, law=name)
            assert theory.entropy(cells.ravel()) == pytest.approx(h, abs=1e-6)
        y = np.linspace(-45, 6, 60_001)
        f = log_density(law, y)
        mean = integrate.trapezoid(y * f, y)
        variance = integrate.trapezoid((y - mean) ** 2 * f, y)
        bound = 0.5 * math.log2(2 * math.pi * math.e * (variance + 1 / 12))
        assert mean_over_shifts(law) <= bound


@pytest.mark.false_variant("thm-lossless-exponent")
def test_the_logarithm_alone_other_bases_and_the_number_itself_are_rejected():
    rejects(check_mean, lambda law: differential_entropy(lambda y: log_density(law, y)))
    rejects(check_mean, lambda law: differential_entropy(smoothed(law)) * math.log(2))
    rejects(check_mean, lambda law: float(law.entropy()) / math.log(2))


@pytest.mark.theorem("prop-lossless-mantissa")
def test_the_first_bits_of_a_mantissa():
    for name in LAWS:
        cells = theory.exponent_law(0.7, digits=3, law=name)
        share = cells.sum(1)
        given = cells[share > 0] / share[share > 0, None]
        divergence = (share[share > 0] * (3 - theory.entropy(given))).sum()
        joint = 1 + theory.entropy(cells.ravel())
        assert joint == pytest.approx(1 + theory.entropy(share) + 3 - divergence, abs=1e-9)
        assert divergence > 0.01
        first = cells.reshape(len(cells), 2, -1).sum(2)
        assert (first[:, 0] >= first[:, 1] - 1e-15).all()
    # a density that rises has it the other way round
    x = np.sqrt(np.linspace(0, 1, 100_001)[1:])
    mantissa = x / 2.0 ** np.floor(np.log2(x))
    assert (mantissa >= 1.5).mean() > 0.5


@pytest.mark.theorem("prop-lossless-scales")
def test_one_table_for_many_scales_costs_their_information():
    scales = [0.25, 1.0, 3.0]
    laws = [theory.exponent_law(s) for s in scales]
    low = -70
    table = np.zeros((3, 90))
    for row, (s, law) in zip(table, zip(scales, laws, strict=True), strict=True):
        start = int(np.floor(np.log2(s))) - 60 - low
        row[start : start + len(law)] = law[:, 0]
    known = np.mean([theory.entropy(row) for row in table])
    single = theory.entropy(table.mean(0))
    information = np.mean([theory.kl_divergence(row, table.mean(0)) for row in table])
    assert single - known == pytest.approx(information, abs=1e-9)
    assert 0.1 < information <= math.log2(3)


@pytest.mark.theorem("prop-lossless-shared")
def test_the_gradient_of_a_shared_value_and_its_best_place():
    g = torch.Generator().manual_seed(0)
    index = torch.randint(3, (4, 5), generator=g)
    layer = torch.nn.Linear(5, 4, bias=False)
    code = Codebook(Bits.of(index, 2), Array(torch.randn(4, generator=g)))
    net = shared_values(torch.nn.Sequential(layer), {"0": code})
    x = torch.randn(7, 5, generator=g)
    net(x).pow(3).sum().backward()
    values = net[0].parametrizations.weight[0].values.grad
    base = code.values.tensor.double()
    for k in range(4):

        def loss(shift, k=k):
            moved = base.clone()
            moved[k] += shift
            return (x.double() @ moved[index].T).pow(3).sum()

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert values[k].item() == pytest.approx(slope.item(), rel=1e-4, abs=1e-4)
    target = torch.randn(4, 5, generator=g)
    means = torch.stack([target[index == k].mean() for k in range(3)])
    best = (means[index] - target).square().sum()
    for k in range(3):
        for shift in (-1e-3, 1e-3):
            moved = means.clone()
            moved[k] += shift
            assert (moved[index] - target).square().sum() > best
