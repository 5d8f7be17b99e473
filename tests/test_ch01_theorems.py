"""Chapter 1: the counting bound over all codes, the roofline against a simulated machine."""

import itertools

import pytest

STRINGS = ["".join(bits) for n in range(4) for bits in itertools.product("01", repeat=n)]


def check_counting(bound) -> bool:
    """Whether `bound(N, k)` holds, strictly, for every injective code of 1- and 2-bit files, and
    is attained up to the last file by the best of them."""
    for n in (1, 2):
        codes = itertools.permutations([len(s) for s in STRINGS[: 2 ** (n + 1) + 3]], 2**n)
        most = [0] * (n + 1)
        for lengths in codes:
            for k in range(1, n + 1):
                most[k] = max(most[k], sum(length <= n - k for length in lengths))
        if any(most[k] != bound(n, k) - 1 for k in range(1, n + 1)):
            return False
    return True


@pytest.mark.theorem("thm-counting")
def test_no_code_shortens_more_files_than_there_are_short_strings():
    assert check_counting(lambda n, k: 2 ** (n - k + 1))


@pytest.mark.false_variant("thm-counting")
@pytest.mark.parametrize("bound", [lambda n, k: 2 ** (n - k), lambda n, k: 2 ** (n - k + 2)])
def test_a_counting_bound_off_by_a_factor_of_two_is_rejected(bound):
    assert not check_counting(bound)


def simulated(rows, columns, bits, batch, beta, pi, tiles=4000):
    """Seconds on a machine that computes with a tile as soon as it has been read, and no sooner."""
    read = computed = 0.0
    for _ in range(tiles):
        read += rows * columns / tiles * bits / 8 / beta
        computed = max(computed, read) + rows * columns / tiles * batch * 2 / pi
    return computed


MACHINES = [(1e11, 1e12), (3e12, 1e15), (5e10, 4e12)]
CASES = list(itertools.product((16, 8, 4), (1, 7, 64, 300, 2000), MACHINES))


def check_roofline(bound) -> bool:
    """Whether `bound(m, n, b, k, beta, pi)` is never above the simulated time, and is nearly it."""
    for bits, batch, (beta, pi) in CASES:
        time = simulated(512, 384, bits, batch, beta, pi)
        least = bound(512, 384, bits, batch, beta, pi)
        if not 0.99 * time <= least <= time * (1 + 1e-9):  # the pipeline fills for a tile or two
            return False
    return True


def roofline(m, n, b, k, beta, pi):
    return max(m * n * b / (8 * beta), 2 * m * n * k / pi)


@pytest.mark.theorem("prop-roofline")
def test_reading_and_computing_bound_the_time_of_a_streaming_machine():
    assert check_roofline(roofline)


@pytest.mark.theorem("prop-roofline")
@pytest.mark.parametrize(("beta", "pi"), MACHINES)
def test_the_gain_of_fewer_bits_has_the_three_cases_of_the_proposition(beta, pi):
    b, small = 16, 4
    crossing = pi * b / (16 * beta)
    for k in (0.1, 0.25, 0.5, 0.9, 1, 3):
        batch = k * crossing
        gain = roofline(9, 9, b, batch, beta, pi) / roofline(9, 9, small, batch, beta, pi)
        expected = b / small if k <= small / b else max(1, 1 / k)
        assert gain == pytest.approx(expected)


@pytest.mark.false_variant("prop-roofline")
@pytest.mark.parametrize(
    "bound",
    [
        lambda m, n, b, k, beta, pi: m * n * b / (8 * beta) + 2 * m * n * k / pi,  # no overlap
        lambda m, n, b, k, beta, pi: max(m * n * b / (8 * beta), m * n * k / pi),  # adds are free
        lambda m, n, b, k, beta, pi: max(m * n * b / beta, 2 * m * n * k / pi),  # bits for bytes
        lambda m, n, b, k, beta, pi: m * n * b / (8 * beta),  # batches are free
    ],
)
def test_a_roofline_with_a_wrong_or_missing_term_is_rejected(bound):
    assert not check_roofline(bound)
