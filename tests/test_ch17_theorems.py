"""Chapter 17: every theorem against a computation that does not use it, and false variants."""

import heapq
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from compresskit import theory
from compresskit.entropy import ans, canonical, lengths, rans


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def best_lengths(p, longest=6):
    """Least mean length over all lengths that Kraft's inequality allows."""
    feasible = (
        np.array(ls)
        for ls in itertools.product(range(1, longest + 1), repeat=len(p))
        if sum(Fraction(1, 2**n) for n in ls) <= 1
    )
    return min(feasible, key=lambda ls: ls @ p)


def sources():
    rng = np.random.default_rng(0)
    yield np.array([0.95, 0.03, 0.02])
    yield np.array([0.5, 0.25, 0.125, 0.125])
    for k in (2, 3, 4, 5, 5):
        yield rng.dirichlet(np.full(k, 0.6))


@pytest.mark.theorem("lem-entropy-siblings")
def test_the_two_rarest_symbols_can_be_siblings_of_greatest_depth():
    for p in sources():
        p = np.sort(p)[::-1]
        best = best_lengths(p)
        found = [
            np.array(ls)
            for ls in itertools.product(range(1, 6), repeat=len(p))
            if sum(2.0**-n for n in ls) <= 1 and np.array(ls) @ p <= best @ p + 1e-12
        ]
        deepest = [ls for ls in found if ls[-1] == ls[-2] == ls.max()]
        assert deepest
        words = [f"{w:0{n}b}" for w, n in zip(canonical(deepest[0]), deepest[0], strict=True)]
        assert words[-1][:-1] == words[-2][:-1]


def check_huffman(rule):
    """`rule` (p) -> mean length of the best prefix code."""
    for p in sources():
        assert float(rule(p)) == pytest.approx(best_lengths(p) @ p, abs=1e-9)


def joined(p):
    heap, total = sorted(p), 0.0
    while len(heap) > 1:
        least = heapq.heappop(heap) + heapq.heappop(heap)
        total += least
        heapq.heappush(heap, least)
    return total


def shannon(p):
    return np.ceil(-np.log2(p)) @ p


def split(p):
    """Fano's code: halve the masses, largest first."""
    p = np.sort(p)[::-1]
    if len(p) < 2:
        return 0.0
    at = 1 + int(np.argmin(np.abs(np.cumsum(p)[:-1] - p.sum() / 2)))
    return p.sum() + split(p[:at]) + split(p[at:])


@pytest.mark.theorem("thm-entropy-huffman")
def test_joining_the_rarest_is_best_and_within_a_bit():
    check_huffman(joined)
    check_huffman(lambda p: lengths(p) @ p)
    for p in sources():
        h = theory.entropy(p)
        assert h - 1e-12 <= joined(p) < h + 1
        assert joined(p) >= 1
    assert joined([0.999, 0.001]) - theory.entropy([0.999, 0.001]) > 0.98  # the bit is no slack


@pytest.mark.false_variant("thm-entropy-huffman")
def test_rounded_logarithms_the_entropy_and_joining_the_largest_are_rejected():
    rejects(check_huffman, shannon)
    rejects(check_huffman, theory.entropy)

    def largest(p):
        heap, total = [-x for x in p], 0.0
        heapq.heapify(heap)
        while len(heap) > 1:
            most = heapq.heappop(heap) + heapq.heappop(heap)
            total -= most
            heapq.heappush(heap, most)
        return total

    rejects(check_huffman, largest)
    rejects(check_huffman, lambda p: math.ceil(math.log2(len(p))))


@pytest.mark.theorem("prop-entropy-canonical")
def test_canonical_words():
    rng = np.random.default_rng(1)
    for _ in range(50):
        bits = rng.integers(1, 7, rng.integers(2, 9))
        if sum(2.0**-bits) > 1:
            continue
        words = [f"{w:0{n}b}" for w, n in zip(canonical(bits), bits, strict=True)]
        assert not any(b.startswith(a) for a, b in itertools.permutations(words, 2))
        for n in set(bits.tolist()):
            same = canonical(bits)[bits == n]
            assert (np.diff(same) == 1).all()


def word(message, p, extra=1):
    """The first digits of the middle of a message's interval, and its probability."""
    low, width = Fraction(0), Fraction(1)
    for s in message:
        low += width * sum(p[:s], Fraction(0))
        width *= p[s]
    count = extra
    while Fraction(1, 2 ** (count - extra)) > width:
        count += 1
    return f"{int((low + width / 2) * 2**count):0{count}b}" if count else "", width


def check_arithmetic(rule):
    """`rule` (message, p) -> word; a prefix code, shorter than log2 1/P + 2."""
    for p in ([Fraction(9, 10), Fraction(1, 10)], [Fraction(1, 7), Fraction(2, 7), Fraction(4, 7)]):
        words = {}
        for message in itertools.product(range(len(p)), repeat=5):
            code, probability = rule(message, p)
            assert len(code) < -math.log2(probability) + 2
            words[message] = code
        for a, b in itertools.permutations(words.values(), 2):
            assert not b.startswith(a)


@pytest.mark.theorem("thm-entropy-arithmetic")
def test_a_message_as_one_number():
    check_arithmetic(word)


@pytest.mark.false_variant("thm-entropy-arithmetic")
def test_one_digit_less_the_lower_end_and_one_digit_more_are_rejected():
    rejects(check_arithmetic, lambda m, p: word(m, p, extra=0))

    def lower(message, p):
        code, width = word(message, p)
        low = Fraction(0)
        scale = Fraction(1)
        for s in message:
            low += scale * sum(p[:s], Fraction(0))
            scale *= p[s]
        count = len(code) - 1
        return f"{int(low * 2**count):0{count}b}" if count else "", width

    rejects(check_arithmetic, lower)
    rejects(check_arithmetic, lambda m, p: word(m, p, extra=3))


def check_step(push):
    """`push` (x, f, c, M) -> x'; undone by division, for every small state, and never longer."""
    total, frequencies = 16, [9, 4, 2, 1]
    before = [0, 9, 13, 15]
    for x in range(1, 3000):
        for f, c in zip(frequencies, before, strict=True):
            new = push(x, f, c, total)
            assert c <= new % total < c + f
            assert f * (new // total) + new % total - c == x
            if x >= f:
                bound = math.log2(x) + math.log2(total / f) + f / x * math.log2(math.e)
                assert math.log2(new) < bound + 1e-12


@pytest.mark.theorem("thm-entropy-rans")
def test_a_step_of_rans_and_the_whole_stream():
    check_step(lambda x, f, c, m: m * (x // f) + c + x % f)
    rng = np.random.default_rng(0)
    for n in (12, 16):
        f = np.array([1, 3, 96, (1 << n) - 100])
        places = rng.choice(4, 40_000, p=f / f.sum()).astype(np.int32)
        same = np.arange(4, dtype=np.int32)
        stream = ans.encode(places, same, 0, f[None], n, 0.0)
        head = len(stream) % 4 or 4  # one lane, one part, and how many words follow
        words = stream[head:]
        ideal = -np.log2(f[places] / 2**n).sum()
        bound = ideal + 2.0 ** (n - 31) * len(places) * math.log2(math.e) + 32 + 33
        assert ideal <= 8 * len(words) <= bound


@pytest.mark.false_variant("thm-entropy-rans")
def test_steps_that_cannot_be_undone_or_grow_more_are_rejected():
    rejects(check_step, lambda x, f, c, m: m * (x // f) + x % f)  # without the offset
    rejects(check_step, lambda x, f, c, m: m * x // f + c)
    rejects(check_step, lambda x, f, c, m: m * (x // f + 1) + c + x % f)

    def other_order(x, f, c, m):
        return m * (x // f) + c + (f - 1 - x % f)

    rejects(check_step, other_order)


@pytest.mark.theorem("prop-entropy-adaptive")
def test_what_learning_costs():
    for counts in ([3, 1, 0], [5, 5], [1, 2, 3, 1]):
        n, k = sum(counts), len(counts)
        message = [s for s, c in enumerate(counts) for _ in range(c)]
        found = set()
        for order in set(itertools.permutations(message)) if n < 8 else [message, message[::-1]]:
            seen, length = [1] * k, 0.0
            for s in order:
                length -= math.log2(seen[s] / sum(seen))
                seen[s] += 1
            found.add(round(length, 9))
        assert len(found) == 1
        arrangements = math.factorial(n) / math.prod(map(math.factorial, counts))
        said = math.log2(math.comb(n + k - 1, k - 1)) + math.log2(arrangements)
        assert found.pop() == pytest.approx(said)
        p = np.array(counts) / n
        assert said <= n * theory.entropy(p) + (k - 1) * math.log2(n + 1) + 1e-9


@pytest.mark.theorem("cor-entropy-table")
def test_the_cost_of_the_wrong_frequencies():
    counts = np.array([60, 20, 15, 5]) * 500
    places = np.repeat(np.arange(4), counts).astype(np.int32)
    same = np.arange(4, dtype=np.int32)
    p = counts / counts.sum()
    right = 8 * rans(torch.from_numpy(places)).nbytes / len(places)
    for f in ([1024] * 4, [2048, 1024, 512, 512], [100, 100, 100, 3796]):
        f = np.array(f)
        stream = ans.encode(places, same, 0, f[None], 12, 0.0)
        extra = 8 * len(stream) / len(places) - right
        assert extra == pytest.approx(theory.kl_divergence(p, f / 4096), abs=0.01)
