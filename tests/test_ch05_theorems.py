"""Chapter 5: every theorem against a computation that does not use it, and false variants of it.

A check is a function of the formula under test. The true formula must pass it and a false one
(the projection on the wrong side, prefixes of the wrong model, a dropped term) must be rejected by
the same check.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from compresskit import losses

RNG_SEEDS = range(5)


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


# --- whose projection ----------------------------------------------------------------------------


def residual(source, target):
    """min over W of mean ||target - W source||^2, by least squares."""
    weight = np.linalg.lstsq(source, target, rcond=None)[0]
    return np.square(target - source @ weight).sum(1).mean()


def teacher_features(seed, count=500, width=8):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(count, width))
        @ np.diag(2.0 ** -np.arange(width))
        @ np.linalg.qr(rng.normal(size=(width, width)))[0]
    )


def check_zero_loss_means_decodable(loss):
    """Whoever has `loss`(h_S, h_T) = 0 must let the teacher's features be read off linearly."""
    for seed in RNG_SEEDS:
        h_t = teacher_features(seed)
        rng = np.random.default_rng(100 + seed)
        students = {
            "linear": h_t @ rng.normal(size=(8, 3)),
            "silent": np.zeros((len(h_t), 3)),
            "all": h_t @ rng.normal(size=(8, 8)),
        }
        energy = np.square(h_t).sum(1).mean()
        for h_s in students.values():
            if loss(h_s, h_t) < 1e-12 * energy:
                assert residual(h_s, h_t) < 1e-9 * energy
        assert loss(students["all"], h_t) < 1e-12 * energy  # so the check is not empty


@pytest.mark.theorem("thm-student-side")
def test_zero_loss_with_the_projection_on_the_student_means_that_the_teacher_is_decodable():
    check_zero_loss_means_decodable(residual)


@pytest.mark.false_variant("thm-student-side")
def test_zero_loss_with_the_projection_on_the_teacher_means_nothing():
    rejects(check_zero_loss_means_decodable, lambda h_s, h_t: residual(h_t, h_s))


def check_teacher_side_is_blind(side):
    """`side`(h_S, h_T), minimized over W, is zero for every linear student, the silent included."""
    for seed in RNG_SEEDS:
        h_t = teacher_features(seed)
        mix = np.random.default_rng(seed).normal(size=(8, 3))
        for matrix in (mix, 0 * mix, mix[:, :1] @ np.ones((1, 3))):
            assert side(h_t @ matrix, h_t) < 1e-20
        more = h_t @ mix + np.square(h_t[:, :3])  # not linear in the teacher's features
        expected = residual(h_t, np.square(h_t[:, :3]))  # what is not explained, and only that
        assert side(more, h_t) == pytest.approx(expected, rel=1e-9)


@pytest.mark.theorem("thm-teacher-side")
def test_with_the_projection_on_the_teacher_every_linear_student_is_perfect():
    check_teacher_side_is_blind(lambda h_s, h_t: residual(h_t, h_s))


@pytest.mark.false_variant("thm-teacher-side")
def test_with_the_projection_on_the_student_or_with_none_not_every_linear_student_is_perfect():
    rejects(check_teacher_side_is_blind, residual)
    rejects(check_teacher_side_is_blind, lambda h_s, h_t: np.square(h_s - h_t[:, :3]).sum())


def check_least_loss(bound):
    """`bound(eigenvalues, d)` is reached by principal components and by no student beaten."""
    for seed in RNG_SEEDS:
        h_t = teacher_features(seed)
        values, vectors = np.linalg.eigh(h_t.T @ h_t / len(h_t))
        values, vectors = values[::-1], vectors[:, ::-1]
        rng = np.random.default_rng(seed)
        for d in (1, 3, 7):
            least = bound(values, d)
            assert residual(h_t @ vectors[:, :d], h_t) == pytest.approx(least, rel=1e-9)
            for power in (1, 2, 3):  # students that are no linear functions
                h_s = np.tanh(h_t @ rng.normal(size=(8, d))) ** power
                assert residual(h_s, h_t) >= least * (1 - 1e-9)


@pytest.mark.theorem("thm-student-side")
def test_no_student_is_closer_than_the_principal_components():
    check_least_loss(lambda values, d: values[d:].sum())


@pytest.mark.false_variant("thm-student-side")
def test_the_least_loss_is_not_another_sum_of_eigenvalues():
    rejects(check_least_loss, lambda values, d: values[d + 1 :].sum())
    rejects(check_least_loss, lambda values, d: values[d - 1 :].sum())
    rejects(check_least_loss, lambda values, d: np.sqrt(values[d:]).sum())


# --- whole texts ---------------------------------------------------------------------------------


class Chain:
    """Two models of texts of `length` symbols, each conditional on the whole prefix."""

    def __init__(self, seed, length=3, symbols=3):
        rng = np.random.default_rng(seed)
        self.symbols, self.length = symbols, length
        self.rows = {
            prefix: rng.dirichlet(np.ones(symbols), size=2)
            for n in range(length)
            for prefix in itertools.product(range(symbols), repeat=n)
        }

    def texts(self):
        return itertools.product(range(self.symbols), repeat=self.length)

    def chance(self, text, model):
        return math.prod(self.rows[text[:t]][model, y] for t, y in enumerate(text))


def divergence(p, q):
    return float(np.sum(p * np.log(p / q)))


def check_sum_over_positions(model_of_prefixes):
    """The divergence of texts is the sum over positions, prefixes drawn from one of the models."""
    for seed in RNG_SEEDS:
        chain = Chain(seed)
        texts = list(chain.texts())
        p, q = (np.array([chain.chance(text, m) for text in texts]) for m in (0, 1))
        total = sum(
            chain.chance(prefix, model_of_prefixes) * divergence(*rows)
            for prefix, rows in chain.rows.items()
        )
        assert total == pytest.approx(divergence(p, q), rel=1e-12)


@pytest.mark.theorem("thm-sequence-kl")
def test_the_divergence_of_texts_is_the_sum_over_the_teachers_prefixes():
    check_sum_over_positions(0)


@pytest.mark.false_variant("thm-sequence-kl")
def test_it_is_not_the_sum_over_the_students_prefixes():
    rejects(check_sum_over_positions, 1)


def estimates(chain):
    """(chances, s, c) of every text: -ln q of its symbols, and their conditional means."""
    chances, s, c = [], [], []
    for text in chain.texts():
        rows = [chain.rows[text[:t]] for t in range(chain.length)]
        chances.append(chain.chance(text, 0))
        s.append([-math.log(q[y]) for (_, q), y in zip(rows, text, strict=True)])
        c.append([-float(p @ np.log(q)) for p, q in rows])
    return np.array(chances), np.array(s), np.array(c)


def moments(chances, values):
    mean = chances @ values
    return mean, chances @ np.square(values - mean)


@pytest.mark.theorem("thm-sequence-kl")
def test_both_estimates_have_the_cross_entropy_of_texts_as_their_mean():
    for seed in RNG_SEEDS:
        chain = Chain(seed)
        chances, s, c = estimates(chain)
        q = np.array([chain.chance(text, 1) for text in chain.texts()])
        expected = -chances @ np.log(q)
        assert moments(chances, s.sum(1))[0] == pytest.approx(expected, rel=1e-12)
        assert moments(chances, c.sum(1))[0] == pytest.approx(expected, rel=1e-12)


def check_variances(predicted):
    """`predicted(of the sum of c, added at the positions, covariance)`: variance of the sum of s.

    On random chains and on the two-symbol example of the page, in which that sum is constant.
    """
    example = Chain(0, length=2, symbols=2)
    tiny = 1e-300  # chances of zero, whose logarithm is never weighed
    example.rows[()] = np.array([[0.5, 0.5], [2 / 3, 1 / 3]])
    example.rows[(0,)] = np.array([[1 - tiny, tiny], [0.5, 0.5]])
    example.rows[(1,)] = np.array([[1 - tiny, tiny], [1 - tiny, tiny]])
    for chain in [example, *map(Chain, RNG_SEEDS)]:
        chances, s, c = estimates(chain)
        added = [
            moments(chances, s[:, t])[1] - moments(chances, c[:, t])[1] for t in range(chain.length)
        ]
        assert min(added) > -1e-12  # part 1: at one position the conditional mean is quieter
        noise = (s - c).sum(1)
        covariance = chances @ (c.sum(1) * noise) - (chances @ c.sum(1)) * (chances @ noise)
        found = predicted(moments(chances, c.sum(1))[1], sum(added), covariance)
        assert found == pytest.approx(moments(chances, s.sum(1))[1], rel=1e-9, abs=1e-12)


@pytest.mark.theorem("thm-sequence-variance")
def test_the_variance_of_a_text_has_three_parts():
    check_variances(lambda of_c, added, covariance: of_c + added + 2 * covariance)


@pytest.mark.false_variant("thm-sequence-variance")
def test_for_whole_texts_the_noise_does_not_simply_add():
    rejects(check_variances, lambda of_c, added, covariance: of_c + added)
    rejects(check_variances, lambda of_c, added, covariance: max(of_c + added, of_c))


def check_gradients_at_the_goal(token_level):
    """At q = p, in the logits, `token_level`(z, p, another, y) has no gradient, and -ln q_y noise.

    Its gradients have mean 0 and the Fisher matrix as covariance. All are autograd's.
    """
    for seed in RNG_SEEDS:
        for p, other in Chain(seed).rows.values():
            goal = torch.from_numpy(p).log()[None]

            def slope(loss, goal=goal):
                z = (goal + 1.5).requires_grad_(True)  # other logits, the same distribution
                return torch.autograd.grad(loss(z), z)[0][0].numpy()

            labels = [torch.tensor([y]) for y in range(3)]
            drawn = np.array([slope(partial(cross_entropy, target=y)) for y in labels])
            np.testing.assert_allclose(p @ drawn, 0, atol=1e-12)
            fisher = np.diag(p) - np.outer(p, p)
            np.testing.assert_allclose(drawn.T @ (p[:, None] * drawn), fisher, atol=1e-12)
            for y in labels:
                found = slope(lambda z, y=y, p=p, other=other: token_level(z, p, other, y))
                np.testing.assert_allclose(found, 0, atol=1e-12)


def to(distribution, z):
    return losses.forward_kl(z, torch.from_numpy(distribution).log()[None])


@pytest.mark.theorem("thm-sequence-variance")
def test_at_the_goal_only_the_gradient_of_drawn_symbols_is_noisy():
    check_gradients_at_the_goal(lambda z, p, other, y: to(p, z))


@pytest.mark.false_variant("thm-sequence-variance")
def test_neither_drawn_symbols_nor_another_teacher_leave_the_goal_in_peace():
    rejects(check_gradients_at_the_goal, lambda z, p, other, y: cross_entropy(z, y))
    rejects(check_gradients_at_the_goal, lambda z, p, other, y: to(other, z))


# --- the top k -----------------------------------------------------------------------------------


def pairs(count=20, classes=7):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(2, count, classes, generator=generator, dtype=torch.float64)


def outside(kept, like):
    return torch.ones_like(like).scatter_(-1, kept.indices, 0.0)


def check_gap(predicted):
    """`predicted(p, q, out)`: what lumping loses of KL(p || q), position by position."""
    z_t, z_s = pairs()
    for k in range(1, 7):
        kept = losses.topk_targets(z_t, k)
        for t, s, *target in zip(z_t, z_s, *kept[:3], strict=True):
            lumped = losses.topk_kl(s[None], losses.TopK(*(x[None] for x in target)), temperature=1)
            full = losses.forward_kl(s[None], t[None])
            out = torch.ones(7, dtype=torch.float64).scatter_(-1, target[0], 0.0)
            lost = predicted(t.softmax(-1), s.softmax(-1), out)
            assert (full - lumped).item() == pytest.approx(lost.item(), rel=1e-9, abs=1e-12)


def conditional(p, out):
    return p * out / (p * out).sum()


def tail_divergence(p, q, out):
    a, b = conditional(p, out), conditional(q, out)
    return torch.where(a > 0, a * (a.clamp_min(1e-300) / b.clamp_min(1e-300)).log(), 0.0).sum()


@pytest.mark.theorem("thm-top-k")
def test_lumping_loses_the_divergence_within_the_tail():
    check_gap(lambda p, q, out: (p * out).sum() * tail_divergence(p, q, out))


@pytest.mark.false_variant("thm-top-k")
def test_lumping_loses_neither_nothing_nor_the_unweighted_divergence():
    rejects(check_gap, lambda p, q, out: 0 * p.sum())
    rejects(check_gap, tail_divergence)


@pytest.mark.theorem("thm-top-k")
def test_the_lumped_loss_rises_with_k_to_the_full_divergence():
    z_t, z_s = pairs()
    found = [
        losses.topk_kl(z_s, losses.topk_targets(z_t, k), temperature=1).item() for k in range(1, 8)
    ]
    assert found == sorted(found)
    full = losses.forward_kl(z_s, z_t).item()
    assert found[5] == pytest.approx(full, rel=1e-12)
    assert found[4] < full


def check_force_on_the_kept_mass(renormalize):
    """A loss on a top-k cache must push the mass of the kept classes as the full loss does."""
    z_t, z_s = pairs()
    for k in (1, 3):
        kept = losses.topk_targets(z_t, k)
        student = z_s.clone().requires_grad_(True)
        loss = losses.topk_kl(student, kept, temperature=1, renormalize=renormalize)
        (gradient,) = torch.autograd.grad(len(z_s) * loss, student)
        true = z_s.softmax(-1) - z_t.softmax(-1)
        inside = 1 - outside(kept, z_t)
        torch.testing.assert_close((gradient * inside).sum(-1), (true * inside).sum(-1))
        torch.testing.assert_close(gradient * inside, true * inside)
        error = (gradient - true).abs().sum(-1)
        rest = (z_t.softmax(-1) * outside(kept, z_t)).sum(-1)
        assert (error <= 2 * rest + 1e-12).all()


@pytest.mark.theorem("thm-top-k")
def test_the_lumped_gradient_is_exact_on_the_kept_classes():
    check_force_on_the_kept_mass(False)


@pytest.mark.false_variant("thm-top-k")
def test_the_renormalized_gradient_puts_no_force_on_the_kept_mass():
    rejects(check_force_on_the_kept_mass, True)


@pytest.mark.theorem("thm-top-k")
def test_the_renormalized_loss_of_one_class_is_zero_for_every_student():
    z_t, z_s = pairs()
    kept = losses.topk_targets(z_t, 1)
    assert losses.topk_kl(z_s, kept, temperature=1, renormalize=True).item() == 0
    assert losses.topk_kl(z_s, kept, temperature=1).item() > 0.1


@pytest.mark.theorem("thm-top-k")
def test_renormalizing_the_teacher_alone_is_off_by_twice_the_tail_for_every_student():
    z_t, z_s = pairs()
    kept = losses.topk_targets(z_t, 3)
    p, q, inside = z_t.softmax(-1), z_s.softmax(-1), 1 - outside(kept, z_t)
    target = p * inside / (p * inside).sum(-1, keepdim=True)
    error = ((q - target) - (q - p)).abs().sum(-1)
    torch.testing.assert_close(error, 2 * (p * (1 - inside)).sum(-1))


# --- many teachers -------------------------------------------------------------------------------


@pytest.mark.theorem("prop-mutual")
def test_many_teachers_are_their_mixture_and_a_constant():
    rng = np.random.default_rng(0)
    for _ in range(20):
        teachers, weights = rng.dirichlet(np.ones(5), size=4), rng.dirichlet(np.ones(4))
        mixture = weights @ teachers
        spread = sum(w * divergence(p, mixture) for w, p in zip(weights, teachers, strict=True))
        for q in rng.dirichlet(np.ones(5), size=3):
            mean = sum(w * divergence(p, q) for w, p in zip(weights, teachers, strict=True))
            assert mean == pytest.approx(divergence(mixture, q) + spread, rel=1e-9)


@pytest.mark.theorem("prop-mutual")
def test_peers_push_as_their_mean_probabilities_and_not_as_their_mean_logits():
    generator = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(3, 10, 6, generator=generator, dtype=torch.float64)
    labels = torch.zeros(10, dtype=torch.int64)
    student = z[0].clone().requires_grad_(True)

    def slope(loss):
        return torch.autograd.grad(loss, student)[0]

    mutual = slope(losses.mutual_losses([student, z[1], z[2]], labels, weight=1.0)[0])
    alone = slope(losses.mutual_losses([student, z[1], z[2]], labels, weight=0.0)[0])
    mixture = slope(losses.forward_kl(student, losses.ensemble_logits(z[1:])))
    geometric = slope(losses.forward_kl(student, z[1:].mean(0)))
    torch.testing.assert_close(mutual - alone, mixture, rtol=0, atol=1e-12)
    assert (mutual - alone - geometric).abs().max() > 0.01
