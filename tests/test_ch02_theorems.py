"""Every theorem of chapter 2 as a check, and false variants of it which that check rejects.

A check takes the disputed formula and returns whether it survives: it must hold on every case and,
where the theorem says so, be attained. So a variant that is too strong fails by a counterexample
and one that is too weak fails by never being attained.
"""

import heapq
import itertools
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from compresskit.theory import (
    binary_entropy,
    bretagnolle_huber_bound,
    cross_entropy,
    entropy,
    gaussian_distortion,
    gaussian_rate,
    kl_divergence,
    linear_layer_rate,
    pinsker_bound,
    reverse_water_filling,
    total_variation,
)

ROUNDING = 1e-12  # sums of at most a few hundred float64 terms of size about 1
LN2 = math.log(2)


def random_pairs(k, count=400, seed=0):
    """`count` pairs of distributions on k outcomes, from nearly uniform to nearly certain."""
    rng = np.random.default_rng(seed)
    for concentration in np.geomspace(0.1, 100, count):
        yield rng.dirichlet(np.full(k, concentration)), rng.dirichlet(np.full(k, concentration))


def two_points():
    """Coins (a, 1 - a) and (b, 1 - b) on a grid, with pairs around 1/2 that nearly coincide."""
    grid = np.linspace(0.005, 0.995, 100)
    for a, b in itertools.product(grid, grid):
        yield np.array([a, 1 - a]), np.array([b, 1 - b])
    for step in [1e-2, 1e-3, 1e-4]:
        yield np.array([0.5 + step, 0.5 - step]), np.array([0.5, 0.5])


# --- Gibbs' inequality


def check_gibbs(lower_bound):
    """-sum p log q >= lower_bound(p, q), with equality where q = p and only there."""
    for p, q in itertools.chain(random_pairs(2), random_pairs(5)):
        if cross_entropy(p, q) <= lower_bound(p, q) + ROUNDING:
            return False
        if abs(cross_entropy(p, p) - lower_bound(p, p)) > ROUNDING:
            return False
    return True


@pytest.mark.theorem("thm-gibbs")
def test_no_model_codes_p_in_fewer_bits_than_p_itself():
    assert check_gibbs(lambda p, q: entropy(p))


@pytest.mark.false_variant("thm-gibbs")
@pytest.mark.parametrize(
    "variant",
    [
        lambda p, q: entropy(q),  # the entropy of the model instead of the source
        lambda p, q: max(entropy(p), entropy(q)),
        lambda p, q: entropy(p) + 0.01 * total_variation(p, q),  # linear in the distance near p = q
        lambda p, q: entropy(p, unit="nats"),  # true, but never attained
    ],
)
def test_false_lower_bounds_on_the_cross_entropy_are_rejected(variant):
    assert not check_gibbs(variant)


# --- the chain rule


def check_chain_rule(total):
    """KL of two joint distributions is total(marginal KL, p(x), q(x), KL of the conditionals)."""
    for p, q in random_pairs(12, seed=1):
        p, q = p.reshape(3, 4), q.reshape(3, 4)
        px, qx = p.sum(1), q.sum(1)
        conditional = kl_divergence(p / px[:, None], q / qx[:, None])
        claimed = total(kl_divergence(px, qx), px, qx, conditional)
        if not math.isclose(kl_divergence(p.ravel(), q.ravel()), claimed, rel_tol=1e-9):
            return False
    return True


@pytest.mark.theorem("thm-kl-chain")
def test_divergence_of_a_pair_is_the_first_plus_the_second_given_the_first():
    assert check_chain_rule(lambda marginal, px, qx, conditional: marginal + px @ conditional)


@pytest.mark.false_variant("thm-kl-chain")
@pytest.mark.parametrize(
    "variant",
    [
        lambda marginal, px, qx, conditional: marginal,  # a dropped term
        lambda marginal, px, qx, conditional: px @ conditional,
        lambda marginal, px, qx, conditional: marginal + qx @ conditional,  # averaged under q
        lambda marginal, px, qx, conditional: marginal + conditional.mean(),
    ],
)
def test_false_chain_rules_are_rejected(variant):
    assert not check_chain_rule(variant)


# --- data processing


def check_data_processing(holds):
    """holds(KL before, KL after) for random channels, for merging outcomes and for relabeling."""
    rng = np.random.default_rng(2)
    for p, q in random_pairs(6):
        channels = [
            rng.dirichlet(np.ones(4), size=6),  # random
            np.repeat(np.eye(3), 2, axis=0),  # outcomes merged in pairs
            np.eye(6)[rng.permutation(6)],  # nothing lost
        ]
        for channel in channels:
            before = kl_divergence(p, q)
            if not holds(before, kl_divergence(p @ channel, q @ channel)):
                return False
    return True


@pytest.mark.theorem("thm-data-processing")
def test_no_channel_makes_two_sources_easier_to_tell_apart():
    assert check_data_processing(lambda before, after: after <= before + ROUNDING)


@pytest.mark.false_variant("thm-data-processing")
@pytest.mark.parametrize(
    "variant",
    [
        lambda before, after: after >= before - ROUNDING,  # the wrong way round
        lambda before, after: after < before,  # strict, although a relabeling loses nothing
        lambda before, after: after <= 0.9 * before,
    ],
)
def test_false_data_processing_inequalities_are_rejected(variant):
    assert not check_data_processing(variant)


# --- total variation


def check_total_variation(formula):
    """formula(p, q) is max over all 2^k events A of p(A) - q(A), k <= 6, by listing the events."""
    for k in [1, 2, 3, 6]:
        events = np.array(list(itertools.product([0, 1], repeat=k)))
        for p, q in random_pairs(k, count=100):
            if abs(formula(p, q) - (events @ (p - q)).max()) > ROUNDING:
                return False
    return True


@pytest.mark.theorem("thm-total-variation")
def test_half_the_l1_distance_is_the_largest_difference_over_all_events():
    assert check_total_variation(total_variation)
    assert check_total_variation(lambda p, q: (p - q)[p > q].sum())  # the event of the proof
    assert check_total_variation(lambda p, q: 1 - np.minimum(p, q).sum())


@pytest.mark.false_variant("thm-total-variation")
@pytest.mark.parametrize(
    "variant",
    [
        lambda p, q: np.abs(p - q).sum(),  # the l1 distance, twice as large
        lambda p, q: np.abs(p - q).max(),  # single outcomes only
        lambda p, q: np.linalg.norm(p - q),
    ],
)
def test_false_formulas_for_total_variation_are_rejected(variant):
    assert not check_total_variation(variant)


# --- Pinsker, Bretagnolle-Huber


def check_pinsker(bound, distance=total_variation):
    """distance <= bound(KL in bits) for every pair, and attained in the limit of close coins."""
    sharpest = 0.0
    for p, q in itertools.chain(two_points(), random_pairs(3), random_pairs(10)):
        if np.array_equal(p, q):
            continue
        ratio = distance(p, q) / bound(kl_divergence(p, q))
        if ratio > 1 + 1e-7:  # KL of nearly equal coins has lost up to 8 digits at step 1e-4
            return False
        sharpest = max(sharpest, ratio)
    return sharpest > 0.9999


@pytest.mark.theorem("thm-pinsker")
def test_total_variation_is_at_most_root_half_kl_and_the_half_is_sharp():
    assert check_pinsker(pinsker_bound)
    assert check_pinsker(lambda bits: math.sqrt(LN2 / 2 * bits))
    assert check_pinsker(lambda bits: math.sqrt(2 * LN2 * bits), lambda p, q: abs(p - q).sum())


@pytest.mark.false_variant("thm-pinsker")
@pytest.mark.parametrize(
    ("bound", "distance"),
    [
        (lambda bits: math.sqrt(LN2 * bits / 4), total_variation),  # a quarter
        (lambda bits: math.sqrt(0.999 * LN2 * bits / 2), total_variation),
        (lambda bits: math.sqrt(bits / 2), total_variation),  # ln 2 forgotten: true, not sharp
        (lambda bits: LN2 * math.sqrt(bits / 2), total_variation),  # ln 2 outside the root
        (lambda bits: LN2 * bits / 2, total_variation),  # the root forgotten
        (pinsker_bound, lambda p, q: abs(p - q).sum()),  # l1 instead of total variation
    ],
)
def test_false_constants_of_pinsker_are_rejected(bound, distance):
    assert not check_pinsker(bound, distance)


def check_bretagnolle_huber(bound):
    """total variation <= bound(KL) < 1 for every pair, also where Pinsker's bound exceeds 1."""
    far = [(np.array([1.0, 0.0]), np.array([b, 1 - b])) for b in np.geomspace(1e-8, 1, 50)]
    for p, q in itertools.chain(two_points(), random_pairs(3), far):
        kl = kl_divergence(p, q)
        if not total_variation(p, q) - 1e-9 <= bound(kl) < 1:
            return False
    return True


@pytest.mark.theorem("prop-bretagnolle-huber")
def test_total_variation_is_below_one_by_an_exponential_in_kl():
    assert check_bretagnolle_huber(bretagnolle_huber_bound)
    crossing = scipy.optimize.brentq(
        lambda nats: pinsker_bound(nats, unit="nats") - bretagnolle_huber_bound(nats, unit="nats"),
        1.0,
        2.0,
    )
    assert crossing == pytest.approx(1.5936, abs=1e-4)


@pytest.mark.false_variant("prop-bretagnolle-huber")
@pytest.mark.parametrize(
    "variant",
    [
        pinsker_bound,  # not below 1
        lambda bits: 1 - math.exp(-LN2 * bits),  # the root forgotten
        lambda bits: math.sqrt(1 - math.exp(-LN2 * bits / 2)),  # the half of Pinsker brought in
    ],
)
def test_false_variants_of_bretagnolle_huber_are_rejected(variant):
    assert not check_bretagnolle_huber(variant)


# --- Kraft and McMillan

WORDS = ["".join(bits) for n in (1, 2, 3) for bits in itertools.product("01", repeat=n)]


def prefix_code_exists(lengths):
    """By exhaustion: try each word that neither extends a chosen one nor is extended by it."""

    def place(chosen, rest):
        if not rest:
            return True
        for bits in itertools.product("01", repeat=rest[0]):
            word = "".join(bits)
            free = all(not word.startswith(c) and not c.startswith(word) for c in chosen)
            if free and place([*chosen, word], rest[1:]):
                return True
        return False

    return place([], list(lengths))


def uniquely_decodable(words):
    """Sardinas and Patterson 1953: no dangling suffix is itself a word."""

    def suffixes(left, right):
        return {b[len(a) :] for a in left for b in right if a != b and b.startswith(a)}

    words = set(words)
    dangling, seen = suffixes(words, words), set()
    while dangling - seen:
        seen |= dangling
        dangling = suffixes(words, dangling) | suffixes(dangling, words)
        if dangling & words:
            return False
    return not seen & words


def check_kraft(feasible):
    """feasible(lengths) decides whether a prefix code exists, and all decodable codes pass it."""
    for k in [1, 2, 3, 4, 5]:
        for lengths in itertools.combinations_with_replacement([1, 2, 3, 4], k):
            if prefix_code_exists(lengths) != feasible(lengths):
                return False
    for words in itertools.combinations(WORDS, 3):
        if uniquely_decodable(words) and not feasible([len(w) for w in words]):
            return False
    return True


@pytest.mark.theorem("thm-kraft")
def test_lengths_belong_to_a_code_exactly_if_their_kraft_sum_is_at_most_one():
    assert check_kraft(lambda lengths: sum(2.0**-n for n in lengths) <= 1)


def test_some_decodable_codes_are_not_prefix_codes():
    assert uniquely_decodable(["0", "01", "11"])  # so McMillan says more than Kraft
    assert not uniquely_decodable(["0", "01", "10"])  # 010 has two readings
    assert not uniquely_decodable(["0", "1", "01"])  # and so has 01


@pytest.mark.false_variant("thm-kraft")
@pytest.mark.parametrize(
    "variant",
    [
        lambda lengths: sum(2.0**-n for n in lengths) < 1,  # forbids complete codes
        lambda lengths: sum(2.0**-n for n in lengths) <= 1.1,
        lambda lengths: sum(n * 2.0**-n for n in lengths) <= 1,
        lambda lengths: max(lengths) >= math.log2(len(lengths)),  # enough long words is not enough
    ],
)
def test_false_kraft_inequalities_are_rejected(variant):
    assert not check_kraft(variant)


# --- Shannon's source coding theorem


def shortest_mean_length(p):
    """The best prefix code of up to 4 symbols, by trying all lengths that pass Kraft."""
    lengths = np.array(list(itertools.product(range(len(p)), repeat=len(p))))
    feasible = (2.0**-lengths).sum(1) <= 1
    return (lengths[feasible] @ p).min()


def check_source_coding(lower, upper):
    """lower(p) <= best mean length < upper(p) always; both ends are approached by some source."""
    nearest_lower = nearest_upper = math.inf
    sources = [p for k in (2, 3, 4) for p, _ in random_pairs(k, count=60)]
    sources += [np.array([0.5, 0.25, 0.25]), np.full(4, 0.25), np.array([1 - 1e-6, 1e-6])]
    for p in sources:
        best = shortest_mean_length(p)
        if best < lower(p) - ROUNDING or best >= upper(p):
            return False
        nearest_lower = min(nearest_lower, best - lower(p))
        nearest_upper = min(nearest_upper, upper(p) - best)
    return nearest_lower < ROUNDING and nearest_upper < 1e-4


@pytest.mark.theorem("thm-source-coding")
def test_the_best_code_is_within_one_bit_above_the_entropy():
    assert check_source_coding(entropy, lambda p: entropy(p) + 1)


def huffman_mean_length(p):
    """The sum of the merged probabilities, which is the mean length of a Huffman code."""
    heap, total = list(p), 0.0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    return total


def check_blocks(upper):
    """Coding n symbols at once costs between H and upper(H, n) bits per symbol."""
    for zero in [0.5, 0.9, 0.99]:
        p = np.array([zero, 1 - zero])
        block = np.ones(1)
        for n in range(1, 11):
            block = np.outer(block, p).ravel()
            per_symbol = huffman_mean_length(block) / n
            if not entropy(p) - ROUNDING <= per_symbol < upper(entropy(p), n):
                return False
    return True


@pytest.mark.theorem("thm-source-coding")
def test_blocks_of_n_symbols_come_within_one_nth_of_a_bit():
    assert check_blocks(lambda h, n: h + 1 / n)


@pytest.mark.false_variant("thm-source-coding")
@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (lambda p: entropy(p) + 0.05, lambda p: entropy(p) + 1),
        (entropy, lambda p: entropy(p) + 0.5),
        (entropy, lambda p: max(1.0, entropy(p)) + 0.1),
        (lambda p: entropy(p, unit="nats"), lambda p: entropy(p) + 1),  # nats for bits
        (entropy, lambda p: entropy(p) + 2),  # true, but one bit is enough
    ],
)
def test_false_source_coding_theorems_are_rejected(lower, upper):
    assert not check_source_coding(lower, upper)


@pytest.mark.false_variant("thm-source-coding")
def test_blocks_do_not_come_within_one_nth_squared_of_a_bit():
    assert not check_blocks(lambda h, n: h + 1 / n**2)


def check_wrong_model(extra):
    """Ideal code lengths -log2 q, spent on a sequence from p, exceed its entropy by extra(p, q)."""
    rng = np.random.default_rng(3)
    for p, q in random_pairs(6, count=60):
        q = 0.9 * q + 0.1 / 6  # so that no symbol is impossible
        sequence = rng.choice(6, p=p, size=2000)
        counted = np.bincount(sequence, minlength=6) / 2000
        spent = -np.log2(q)[sequence].mean()
        if not math.isclose(spent - entropy(counted), extra(counted, q), rel_tol=1e-8):
            return False
    return True


@pytest.mark.theorem("cor-wrong-model")
def test_the_wrong_model_costs_the_divergence_in_bits():
    assert check_wrong_model(kl_divergence)


@pytest.mark.false_variant("cor-wrong-model")
@pytest.mark.parametrize(
    "variant",
    [
        lambda p, q: kl_divergence(q, p) if (p > 0).all() else 0.0,  # arguments swapped
        lambda p, q: kl_divergence(p, q, unit="nats"),
        lambda p, q: entropy(q) - entropy(p),
        total_variation,
    ],
)
def test_false_costs_of_the_wrong_model_are_rejected(variant):
    assert not check_wrong_model(variant)


# --- bits through an index


def information_through(joint):
    """I(X; M) in bits of a joint distribution, as the mean of KL(law of X given m, law of X)."""
    given = joint.sum(0) > 0
    columns = joint[:, given] / joint[:, given].sum(0)
    source = np.repeat(joint.sum(1)[:, None], columns.shape[1], axis=1)
    return kl_divergence(columns, source, axis=0) @ joint.sum(0)[given]


def check_index_information(cap):
    """I(X; M) <= cap(law of M), for random and for deterministic encoders, which attain it."""
    rng = np.random.default_rng(4)
    nearest = math.inf
    for p, _ in random_pairs(8, count=100):
        noisy = rng.dirichlet(np.full(4, 0.3), size=8)
        fixed = np.eye(4)[rng.integers(0, 4, size=8)]
        for encoder in (noisy, fixed):
            joint = p[:, None] * encoder
            slack = cap(joint.sum(0)) - information_through(joint)
            if slack < -ROUNDING:
                return False
            nearest = min(nearest, slack)
    return nearest < ROUNDING


@pytest.mark.theorem("lem-index-information")
def test_an_index_carries_no_more_information_than_its_entropy():
    assert check_index_information(entropy)


@pytest.mark.false_variant("lem-index-information")
@pytest.mark.parametrize(
    "variant",
    [
        lambda m: entropy(m) - 0.01,
        lambda m: 0.9 * entropy(m),
        lambda m: entropy(m, unit="nats"),
        lambda m: math.log2(4) + 0.1,  # true, but attained by no index of four values
    ],
)
def test_false_caps_on_the_information_of_an_index_are_rejected(variant):
    assert not check_index_information(variant)


# --- Gaussian rate-distortion

NORMAL = scipy.stats.norm


def quantized_gaussian(thresholds):
    """Entropy (bits) and least mean squared error of N(0, 1) cut at `thresholds`, exactly."""
    edges = np.concatenate([[-np.inf], np.sort(thresholds), [np.inf]])
    mass = np.diff(NORMAL.cdf(edges))
    mass, first = mass[mass > 0], -np.diff(NORMAL.pdf(edges))[mass > 0]
    return entropy(mass / mass.sum()), 1 - (first**2 / mass).sum()


def information_of_the_test_channel(distortion):
    """I(X; Y) in bits for X = Y + noise, by a sum over a fine grid of both variables."""
    y = np.linspace(-9, 9, 1201) * math.sqrt(1 - distortion)
    z = np.linspace(-9, 9, 1201) * math.sqrt(distortion)
    weight_y = NORMAL.pdf(y, scale=math.sqrt(1 - distortion)) * (y[1] - y[0])
    weight_z = NORMAL.pdf(z, scale=math.sqrt(distortion)) * (z[1] - z[0])
    log_ratio = NORMAL.logpdf(z, scale=math.sqrt(distortion)) - NORMAL.logpdf(y[:, None] + z)
    return weight_y @ log_ratio @ weight_z / LN2


def check_gaussian_converse(curve):
    """No scalar quantizer of N(0, 1) is below curve(entropy), and the test channel is on it."""
    rng = np.random.default_rng(5)
    cuts = [np.arange(-30, 30) * step + 0.5 * step for step in (0.25, 0.5, 1, 2, 3, 4)]
    cuts += [rng.normal(scale=1.5, size=count) for count in rng.integers(1, 20, size=300)]
    for thresholds in cuts:
        rate, distortion = quantized_gaussian(thresholds)
        if distortion < curve(rate) - ROUNDING:
            return False
    for distortion in [0.05, 0.25, 0.6]:  # the grid misses 1e-18 of the mass; sums lose 1e-9
        rate = information_of_the_test_channel(distortion)
        if not math.isclose(curve(rate), distortion, rel_tol=1e-7):
            return False
    return True


@pytest.mark.theorem("thm-gaussian-converse")
def test_no_quantizer_of_a_gaussian_beats_the_curve_and_the_test_channel_is_on_it():
    assert check_gaussian_converse(lambda rate: gaussian_distortion(rate, 1.0))


@pytest.mark.false_variant("thm-gaussian-converse")
@pytest.mark.parametrize(
    "variant",
    [
        lambda rate: 2.0**-rate,  # 3 dB a bit
        lambda rate: 2.0 ** (-4 * rate),
        lambda rate: 1.5 * 2.0 ** (-2 * rate),  # below what an entropy-coded grid reaches
        lambda rate: math.exp(-2 * rate),  # nats for bits
        lambda rate: math.sqrt(3) * math.pi / 2 * 2.0 ** (-2 * rate),  # Panter-Dite's constant
    ],
)
def test_false_distortion_rate_curves_are_rejected(variant):
    assert not check_gaussian_converse(variant)


def cap_probability(sine, n):
    """Chance that a uniform point of the sphere in R^n is within the angle of a given one."""
    return 0.5 * scipy.special.betainc((n - 1) / 2, 0.5, sine**2)


def check_spherical_cap(lower_bound):
    """lower_bound(sine, n) <= the exact chance, with the same exponential rate in n."""
    sines = np.linspace(0.05, 1.0, 20)
    for n in [2, 3, 8, 64, 256]:
        exact = cap_probability(sines, n)
        if (lower_bound(sines, n) > exact * (1 + 1e-9)).any():
            return False
    exponent = np.log2(lower_bound(np.array([0.5]), 256)) / 256
    return abs(exponent[0] + 1) < 0.06  # log2(pi n) / n = 0.04 of it is the factor in front


@pytest.mark.theorem("lem-spherical-cap")
def test_a_cap_has_at_least_the_chance_used_in_the_random_coding_proof():
    assert check_spherical_cap(lambda sine, n: sine ** (n - 1) / (math.pi * (n - 1)))


@pytest.mark.false_variant("lem-spherical-cap")
@pytest.mark.parametrize(
    "variant",
    [
        lambda sine, n: sine ** (n - 1),
        lambda sine, n: sine ** (n - 1) / math.pi,
        lambda sine, n: sine ** (2 * n) / (math.pi * n),  # true, but of the wrong exponent
    ],
)
def test_false_cap_bounds_are_rejected(variant):
    assert not check_spherical_cap(variant)


def random_code_distortion(rate, n):
    """Mean squared error of a random spherical code of 2^(n rate) words for N(0, 1)^n, exactly.

    With t the largest cosine and r the norm of the source vector, the best common length of the
    words leaves 1 - E[r]^2 E[t]^2 / n; P(t <= cos) is (1 - cap)^M.
    """
    cosine = np.linspace(0, 1, 20_001)
    cap = cap_probability(np.sqrt(1 - cosine**2), n)
    mean_cosine = np.trapezoid(1 - np.exp(2.0 ** (n * rate) * np.log1p(-cap)), cosine)
    log_norm = scipy.special.gammaln((n + 1) / 2) - scipy.special.gammaln(n / 2)
    return 1 - 2 / n * math.exp(2 * log_norm) * mean_cosine**2


def check_random_codes(curve):
    """Random codes of length 8 to 512 come down to curve(rate), from above and ever closer."""
    for rate in [0.5, 1.0]:
        gaps = [random_code_distortion(rate, n) - curve(rate) for n in (8, 32, 128, 512)]
        if min(gaps) < 0 or sorted(gaps, reverse=True) != gaps or gaps[-1] > 0.03:
            return False
    return True


@pytest.mark.theorem("thm-gaussian-coding")
def test_random_codes_approach_the_rate_distortion_curve_from_above():
    assert check_random_codes(lambda rate: gaussian_distortion(rate, 1.0))


@pytest.mark.false_variant("thm-gaussian-coding")
@pytest.mark.parametrize(
    "variant",
    [
        lambda rate: 2.0 ** (-2.5 * rate),  # more than any code can do
        lambda rate: math.exp(-2 * rate),
        lambda rate: 1.1 * 2.0 ** (-2 * rate),  # less than random codes do
    ],
)
def test_false_limits_of_random_codes_are_rejected(variant):
    assert not check_random_codes(variant)


# --- sources that are not Gaussian


def quantized_mixture(width, levels):
    """Rate, distortion, variance, KL of a source: 90 % on [-width, width], 10 % on [-1, 1].

    Both parts are uniform. The quantizer has one level, 0, for [-width, width] and `levels` equal
    cells for the rest; its rate is its entropy. The KL is to the Gaussian of equal variance.
    """
    wide, narrow = 0.05, 0.9 / (2 * width) + 0.05  # densities
    variance = 0.9 * width**2 / 3 + 0.1 / 3
    kl = 2 * width * narrow * math.log(narrow) + 2 * (1 - width) * wide * math.log(wide)
    kl += 0.5 * math.log(2 * math.pi * math.e * variance)
    middle = 2 * width * narrow
    cell = 2 * (1 - width) / levels
    masses = np.concatenate([[middle], np.full(levels, cell * wide)])
    distortion = middle * width**2 / 3 + (1 - middle) * cell**2 / 12
    return entropy(masses / masses.sum()), distortion, variance, kl / LN2


def check_shannon_lower_bound(bound):
    """No quantizer of a spiky source has a rate below bound(distortion, variance, KL in bits)."""
    nearest = math.inf
    for width in np.geomspace(1e-3, 0.3, 20):
        for levels in [2, 4, 16, 64, 256]:
            rate, distortion, variance, kl = quantized_mixture(width, levels)
            slack = rate - bound(distortion, variance, kl)
            if slack < -ROUNDING:
                return False
            nearest = min(nearest, slack)
    return nearest < 0.5  # a scalar quantizer can be 0.25 bits from it, so a slack bound shows


@pytest.mark.theorem("prop-shannon-lower-bound")
def test_a_source_needs_at_least_the_gaussian_rate_minus_its_divergence():
    assert check_shannon_lower_bound(lambda d, v, kl: max(0.0, gaussian_rate(d, v) - kl))


@pytest.mark.false_variant("prop-shannon-lower-bound")
@pytest.mark.parametrize(
    "variant",
    [
        lambda d, v, kl: gaussian_rate(d, v),  # the Gaussian is the hardest source, not the easiest
        lambda d, v, kl: gaussian_rate(d, v) - kl / 2,
        lambda d, v, kl: gaussian_rate(d, v) - kl * LN2,  # nats for bits
        lambda d, v, kl: gaussian_rate(d, v) - 2 * kl - 1,  # true, but far from any quantizer
    ],
)
def test_false_lower_bounds_for_other_sources_are_rejected(variant):
    assert not check_shannon_lower_bound(variant)


# --- reverse water-filling


def numeric_least_rate(variances, total):
    """min of sum log2(v / d) / 2 over 0 < d <= v, sum d = total, by a general-purpose optimizer."""
    result = scipy.optimize.minimize(
        lambda d: 0.5 * np.log2(variances / d).sum(),
        variances * total / variances.sum(),
        jac=lambda d: -0.5 / LN2 / d,
        bounds=[(1e-9 * v, v) for v in variances],
        constraints={"type": "eq", "fun": lambda d: d.sum() - total},
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-13},
    )
    return result.fun


def check_water_filling(allocate):
    """allocate(variances, total) obeys 0 <= d <= v, sum d = total, and nothing costs less."""
    rng = np.random.default_rng(6)
    for n in [1, 2, 3, 5]:
        for _ in range(10):
            variances = rng.exponential(size=n) ** 2 + 1e-3
            total = rng.uniform(0.1, 0.95) * variances.sum()
            d = np.asarray(allocate(variances, total))
            if abs(d.sum() - total) > 1e-9 * total or (d > variances + 1e-12).any():
                return False
            if gaussian_rate(d, variances).sum() > numeric_least_rate(variances, total) + 1e-6:
                return False
    return True


@pytest.mark.theorem("thm-water-filling")
def test_no_other_split_of_the_distortion_costs_fewer_bits():
    assert check_water_filling(lambda v, total: reverse_water_filling(v, total).distortions)


@pytest.mark.theorem("thm-water-filling")
def test_the_tangent_of_the_proof_lies_below_every_split():
    rng = np.random.default_rng(7)
    for _ in range(300):
        variances = rng.exponential(size=5)
        best = reverse_water_filling(variances, 0.3 * variances.sum())
        d = rng.exponential(size=5)
        tangent = best.rates - (d - best.distortions) / (2 * LN2 * best.level)
        assert (gaussian_rate(d, variances) >= tangent - ROUNDING).all()


@pytest.mark.false_variant("thm-water-filling")
@pytest.mark.parametrize(
    "variant",
    [
        lambda v, total: np.full(len(v), total / len(v)),  # the same for all, also above variance
        lambda v, total: np.minimum(v, total / len(v)),  # the level not raised for the flooded
        lambda v, total: v * total / v.sum(),  # in proportion: the same rate for all
        lambda v, total: v - reverse_water_filling(v, v.sum() - total).distortions,  # from the top
    ],
)
def test_false_allocations_are_rejected(variant):
    assert not check_water_filling(variant)


# --- the rate of a linear layer


def check_linear_layer(rate):
    """rate(variance, S, D) is least among Gaussian error covariances K with tr(S K) = D.

    A row w = w' + e with e ~ N(0, K), w' ~ N(0, variance I - K) independent costs
    log2(det(variance I) / det K) / 2 bits; the check compares with random K and with the best.
    """
    rng = np.random.default_rng(8)
    n, variance = 3, 0.7
    for _ in range(20):
        root = rng.normal(size=(n, n)) * [3.0, 1.0, 0.2]
        second = root @ root.T
        distortion = rng.uniform(0.02, 0.9) * variance * np.trace(second)
        claimed = rate(variance, second, distortion)
        cheapest = math.inf
        for _ in range(200):
            basis = np.linalg.qr(rng.normal(size=(n, n)))[0]
            shares = variance * rng.uniform(0.01, 1, size=n)
            k = basis * shares @ basis.T
            k *= min(1.0, distortion / np.trace(second @ k))  # now tr(S K) <= D
            cheapest = min(cheapest, -0.5 * np.linalg.slogdet(k / variance)[1] / LN2 / n)
        lam, axes = np.linalg.eigh(second)
        best = reverse_water_filling(variance * lam, distortion).distortions / lam
        k = axes * best @ axes.T
        cost = -0.5 * np.linalg.slogdet(k / variance)[1] / LN2 / n
        spent = np.trace(second @ k)
        if cheapest < claimed - 1e-9 or abs(cost - claimed) > 1e-9 or spent > distortion * 1.000001:
            return False
    return True


@pytest.mark.theorem("cor-linear-layer")
def test_no_error_covariance_serves_a_layer_in_fewer_bits():
    assert check_linear_layer(linear_layer_rate)


@pytest.mark.false_variant("cor-linear-layer")
@pytest.mark.parametrize(
    "variant",
    [
        lambda v, s, d: linear_layer_rate(v, np.diag(np.diag(s)), d),  # correlations ignored
        lambda v, s, d: linear_layer_rate(v, np.eye(3) * np.trace(s) / 3, d),  # white inputs
        lambda v, s, d: linear_layer_rate(v, s, d / 3),  # mean for total
        lambda v, s, d: 3 * linear_layer_rate(v, s, d),  # bits per row for bits per weight
    ],
)
def test_false_rates_of_a_layer_are_rejected(variant):
    assert not check_linear_layer(variant)


@pytest.mark.theorem("thm-source-coding")
def test_a_sparse_mask_costs_its_binary_entropy_in_long_blocks():
    kept = 0.1
    block = np.ones(1)
    for _ in range(12):
        block = np.outer(block, [1 - kept, kept]).ravel()
    assert binary_entropy(kept) <= huffman_mean_length(block) / 12 < binary_entropy(kept) + 1 / 12
