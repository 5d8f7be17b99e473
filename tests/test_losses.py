"""Losses of distillation: what they equal, what they survive, what they refuse."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from compresskit import theory
from compresskit.losses import (
    TopK,
    distillation_loss,
    ensemble_logits,
    feature_loss,
    forward_kl,
    jensen_shannon,
    logit_matching,
    mutual_losses,
    reverse_kl,
    softmax_temperature,
    topk_kl,
    topk_targets,
)

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon]
HALVES = [torch.float16, torch.bfloat16]
TYPES = [*HALVES, torch.float32]
TEMPERATURES = [0.5, 1.0, 2.0, 4.0, 10.0]


def normal(*shape, seed=0, scale=2.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=dtype)


def classes(*shape, count=5, seed=9):
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(seed))


def probabilities(logits, temperature=1.0):
    """The definition, by hand, one vector at a time."""
    weights = [math.exp(z / temperature) for z in logits]
    return [w / sum(weights) for w in weights]


def kl_by_hand(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def gradient(loss, logits):
    logits = logits.clone().requires_grad_(True)
    value = loss(logits)
    value.backward()
    return value.item(), logits.grad


# --- the definitions


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_softmax_is_its_definition(temperature):
    z = normal(3, 5)
    by_hand = torch.tensor([probabilities(row, temperature) for row in z.tolist()]).double()
    torch.testing.assert_close(
        softmax_temperature(z, temperature), by_hand, atol=1e-7, rtol=0
    )  # 1e-7: torch.tensor of floats is float32


def test_softmax_runs_along_the_dimension_it_is_told():
    z = normal(3, 5, 4)
    torch.testing.assert_close(
        softmax_temperature(z, 3.0, dim=1), (z / 3).softmax(1), atol=1e-15, rtol=0
    )


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 5)])
def test_divergences_are_means_of_their_definitions(shape, temperature):
    s, t = normal(*shape), normal(*shape, seed=1)
    p = [probabilities(row, temperature) for row in t.reshape(-1, 5).tolist()]
    q = [probabilities(row, temperature) for row in s.reshape(-1, 5).tolist()]
    m = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in zip(p, q, strict=True)]
    expected = {
        forward_kl: np.mean([kl_by_hand(a, b) for a, b in zip(p, q, strict=True)]),
        reverse_kl: np.mean([kl_by_hand(b, a) for a, b in zip(p, q, strict=True)]),
        jensen_shannon: np.mean(
            [(kl_by_hand(a, c) + kl_by_hand(b, c)) / 2 for a, b, c in zip(p, q, m, strict=True)]
        ),
    }
    for loss, value in expected.items():
        found = loss(s, t, temperature=temperature).item()
        assert math.isclose(found, value, rel_tol=1e-11)  # float64, terms that nearly cancel


def test_the_forward_divergence_is_that_of_chapter_two_in_nats():
    s, t = normal(6, 7), normal(6, 7, seed=1)
    p, q = softmax_temperature(t, 2.0), softmax_temperature(s, 2.0)
    value = theory.kl_divergence(p, q, unit="nats").mean()
    assert math.isclose(forward_kl(s, t, temperature=2.0).item(), value, rel_tol=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_the_loss_is_the_weighted_sum_of_torchs_two_terms(alpha, temperature):
    s, t, y = normal(8, 5), normal(8, 5, seed=1), classes(8)
    soft = F.kl_div(
        (s / temperature).log_softmax(-1),
        (t / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    expected = (1 - alpha) * F.cross_entropy(s, y) + alpha * temperature**2 * soft
    found = distillation_loss(s, t, y, temperature=temperature, alpha=alpha)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


# T² KL(teacher || student), batchmean, and cross-entropy of 64 rows of 100 float32 logits, as
# torch computed them once in float32; 2e-6 is a few units in its last place.
REFERENCE = {1: 6.440179824829102, 2: 8.331840515136719, 4: 8.716545104980469, 10: 8.83885192871}
REFERENCE_CE = 8.220048904418945


@pytest.mark.parametrize("temperature", REFERENCE)
def test_the_loss_agrees_with_recorded_values(temperature):
    with np.load(Path(__file__).parent / "data" / "distillation.npz") as stored:
        s, t, y = (torch.from_numpy(stored[k]) for k in ("student", "teacher", "labels"))
    for alpha, expected in [(1.0, REFERENCE[temperature]), (0.0, REFERENCE_CE)]:
        found = distillation_loss(s, t, y, temperature=temperature, alpha=alpha).item()
        assert math.isclose(found, expected, rel_tol=2e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_the_two_conventions_are_mirror_images(alpha):
    s, t, y = normal(8, 5), normal(8, 5, seed=1), classes(8)
    soft = distillation_loss(s, t, y, temperature=4.0, alpha=alpha)
    hard = distillation_loss(s, t, y, temperature=4.0, alpha=1 - alpha, alpha_weighs="hard")
    torch.testing.assert_close(soft, hard, rtol=1e-15, atol=0)


def test_alpha_weighs_the_term_it_is_said_to_weigh():
    s, t, y = normal(8, 5), normal(8, 5, seed=1), classes(8)
    ce = F.cross_entropy(s, y)
    assert distillation_loss(s, t, y, temperature=4.0, alpha=0.0) == pytest.approx(ce)
    hard = distillation_loss(s, t, y, temperature=4.0, alpha=1.0, alpha_weighs="hard")
    assert hard == pytest.approx(ce)


# --- gradients


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_gradient_of_the_forward_divergence_is_the_difference_over_the_temperature(
    temperature,
):
    s, t = normal(4, 6), normal(4, 6, seed=1)
    _, found = gradient(lambda z: forward_kl(z, t, temperature=temperature), s)
    p, q = ((z / temperature).softmax(-1) for z in (t, s))
    torch.testing.assert_close(found, (q - p) / temperature / 4, rtol=0, atol=1e-15)


@pytest.mark.parametrize("loss", [*DIVERGENCES, logit_matching])
def test_gradients_are_those_of_finite_differences(loss):
    s, t = normal(3, 4).requires_grad_(True), normal(3, 4, seed=1)
    assert torch.autograd.gradcheck(lambda z: loss(z, t), s)


def test_gradients_of_the_lumped_and_the_mutual_losses_are_those_of_finite_differences():
    s, t = normal(2, 5).requires_grad_(True), normal(2, 5, seed=1)
    for k in (1, 2, 5):
        for renormalize in (False, True):
            targets = topk_targets(t, k, temperature=2.0)
            assert torch.autograd.gradcheck(
                lambda z, targets=targets, renormalize=renormalize: topk_kl(
                    z, targets, temperature=2.0, renormalize=renormalize
                ),
                s,
            )
    y = classes(2)
    assert torch.autograd.gradcheck(lambda z: mutual_losses([z, t], y)[0], s)


@pytest.mark.parametrize("loss", [*DIVERGENCES, logit_matching])
def test_no_gradient_reaches_the_teacher(loss):
    s, t = normal(3, 4).requires_grad_(True), normal(3, 4, seed=1).requires_grad_(True)
    loss(s, t).backward()
    assert t.grad is None
    assert s.grad.abs().max() > 0


def test_no_gradient_reaches_the_teacher_through_the_combined_loss_or_features():
    s, t = normal(3, 5).requires_grad_(True), normal(3, 5, seed=1).requires_grad_(True)
    distillation_loss(s, t, classes(3), temperature=4.0, alpha=0.5).backward()
    topk_kl(s, topk_targets(t, 2), temperature=1.0).backward()
    feature_loss(s, t).backward()
    assert t.grad is None


# --- high temperature


def test_scaled_divergence_tends_to_logit_matching_at_the_rate_one_over_temperature():
    s, t = normal(8, 10), normal(8, 10, seed=1, scale=3.0)
    limit, direction = gradient(lambda z: logit_matching(z, t), s)
    away, aside = [], []
    for temperature in (100.0, 1000.0, 10_000.0):
        value, slope = gradient(lambda z, T=temperature: T**2 * forward_kl(z, t, temperature=T), s)
        away.append(abs(value - limit) / limit)
        aside.append(((slope - direction).norm() / direction.norm()).item())
    assert aside[-1] < 1e-3
    for errors in (away, aside):
        assert all(8 < a / b < 12 for a, b in itertools.pairwise(errors))


def test_the_limit_ignores_constants_and_has_the_gradient_of_centered_regression():
    s, t = normal(3, 6), normal(3, 6, seed=1)
    value, slope = gradient(lambda z: logit_matching(z, t), s)
    centered = (s - t) - (s - t).mean(-1, keepdim=True)
    assert math.isclose(value, centered.square().sum().item() / (2 * 6 * 3), rel_tol=1e-14)
    torch.testing.assert_close(slope, centered / 6 / 3, rtol=0, atol=1e-15)
    assert math.isclose(logit_matching(s + 7, t - 3).item(), value, rel_tol=1e-12)


def test_at_a_temperature_of_a_thousand_float32_inputs_do_not_cost_the_value():
    s, t = normal(8, 10, dtype=torch.float32), normal(8, 10, seed=1, dtype=torch.float32)
    T = 1000.0
    exact = T**2 * forward_kl(s.double(), t.double(), temperature=T)
    ours = T**2 * forward_kl(s, t, temperature=T)
    narrow = T**2 * F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")
    assert math.isclose(ours.item(), exact.item(), rel_tol=1e-9)
    assert abs(narrow.item() / exact.item() - 1) > 1e-3  # the digits that float64 keeps


# --- extreme logits


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("loss", DIVERGENCES)
@pytest.mark.parametrize("size", [1e4, None])
def test_largest_logits_give_finite_values_and_finite_gradients(loss, temperature, dtype, size):
    big = torch.finfo(dtype).max if size is None else size
    rows = [[big, -big, 0.0], [-big, big, big], [big, big, big], [0.0, 0.0, 0.0], [0, -big, 1]]
    for t in rows:
        s = torch.tensor(rows, dtype=dtype)
        t = torch.tensor([t] * len(rows), dtype=dtype)
        value, slope = gradient(lambda z, t=t: loss(z, t, temperature=temperature), s)
        assert math.isfinite(value)
        assert slope.isfinite().all()
        assert slope.dtype == dtype


@pytest.mark.parametrize("dtype", TYPES)
def test_the_gradient_at_the_largest_logits_is_the_formulas(dtype):
    big = torch.finfo(dtype).max
    s, t = torch.tensor([big, -big], dtype=dtype), torch.tensor([-big, big], dtype=dtype)
    value, slope = gradient(lambda z: forward_kl(z, t, temperature=2.0), s)
    assert value == big  # the gap of 2 big, halved by the temperature
    assert slope.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("dtype", TYPES)
def test_every_other_loss_survives_the_largest_logits(dtype):
    big = torch.finfo(dtype).max
    s = torch.tensor([[big, -big, 0], [-big, big, big]], dtype=dtype)
    t, y = s.flip(-1), torch.tensor([1, 0])
    losses = [
        lambda z: distillation_loss(z, t, y, temperature=4.0, alpha=0.5),
        lambda z: mutual_losses([z, t], y, temperature=4.0).sum(),
        lambda z: ensemble_logits([z, t]).sum(),
        *(
            lambda z, k=k, r=r: topk_kl(z, topk_targets(t, k), temperature=1.0, renormalize=r)
            for k in (1, 2, 3)
            for r in (False, True)
        ),
    ]
    for loss in losses:
        value, slope = gradient(loss, s)
        assert math.isfinite(value)
        assert slope.isfinite().all()


def test_a_gap_that_underflows_softmax_gives_the_right_loss_and_gradient():
    """log(softmax(z)) is -inf here, which made the loss infinite and its gradient NaN."""
    s, t = torch.tensor([[300.0, 0.0, -5.0]]), torch.tensor([[10.0, 5.0, 0.0]])
    naive, broken = gradient(
        lambda z: F.kl_div((z / 2).softmax(-1).log(), (t / 2).softmax(-1), reduction="batchmean"),
        s,
    )
    assert math.isinf(naive)
    assert broken.isnan().any()
    value, slope = gradient(
        lambda z: distillation_loss(z, t, torch.tensor([0]), temperature=2.0, alpha=1.0), s
    )
    p, q = ((z.double() / 2).softmax(-1) for z in (t, s))
    by_hand = sum(
        a * (math.log(a) - b) for a, b in zip(p[0].tolist(), [0.0, -150.0, -152.5], strict=True)
    )
    assert math.isclose(value, 4 * by_hand, rel_tol=1e-12)
    torch.testing.assert_close(slope.double(), 2 * (q - p), rtol=0, atol=1e-7)  # float32


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_logits_are_worked_on_in_full(dtype):
    s, t = normal(16, 100).to(dtype), normal(16, 100, seed=1).to(dtype)
    for loss in (*DIVERGENCES, logit_matching):
        torch.testing.assert_close(loss(s, t), loss(s.double(), t.double()), rtol=0, atol=0)


@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(2, 8),
    st.floats(0.01, 1e4),
    st.floats(0.01, 1e4),
)
def test_divergences_are_never_negative_and_vanish_for_shifted_twins(seed, n, k, scale, T):
    s, t = normal(n, k, seed=seed, scale=scale), normal(n, k, seed=seed + 1, scale=scale)
    for loss in DIVERGENCES:
        assert loss(s, t, temperature=T) >= -1e-14  # sums of terms of order 1
        assert abs(loss(t + 3.0, t, temperature=T)) < 1e-10 * max(1.0, scale / T)
    assert jensen_shannon(s, t, temperature=T) <= math.log(2) + 1e-14


# --- positions


def test_a_longer_sequence_does_not_weigh_more():
    """kl_div's batchmean divides (batch, length, vocabulary) by the batch only."""
    s, t = normal(2, 7, 11), normal(2, 7, 11, seed=1)
    y = classes(2, 7, count=11)
    batchmean = F.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    ours = distillation_loss(s, t, y, temperature=1.0, alpha=1.0)
    assert batchmean.item() / ours.item() == pytest.approx(7, rel=1e-12)
    flat = (s.flatten(0, 1), t.flatten(0, 1), y.flatten())
    for alpha in (0.0, 0.5, 1.0):
        whole = distillation_loss(s, t, y, temperature=3.0, alpha=alpha)
        rows = distillation_loss(*flat, temperature=3.0, alpha=alpha)
        torch.testing.assert_close(whole, rows, rtol=1e-14, atol=0)


@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_ignored_positions_count_in_neither_term(ignore_index):
    s, t, y = normal(2, 6, 5), normal(2, 6, 5, seed=1), classes(2, 6)
    y[0, :4] = ignore_index
    keep = y != ignore_index
    for alpha in (0.0, 0.4, 1.0):
        masked = distillation_loss(s, t, y, temperature=2.0, alpha=alpha, ignore_index=ignore_index)
        chosen = distillation_loss(s[keep], t[keep], y[keep], temperature=2.0, alpha=alpha)
        torch.testing.assert_close(masked, chosen, rtol=1e-15, atol=0)
    ce = F.cross_entropy(s.flatten(0, 1), y.flatten(), ignore_index=ignore_index)
    hard = distillation_loss(s, t, y, temperature=2.0, alpha=0.0, ignore_index=ignore_index)
    assert hard.item() == pytest.approx(ce.item(), rel=1e-12)


@pytest.mark.parametrize("loss", [*DIVERGENCES, logit_matching])
def test_a_mask_chooses_the_positions_that_count(loss):
    s, t = normal(2, 6, 5), normal(2, 6, 5, seed=1)
    keep = classes(2, 6, count=2).bool()
    torch.testing.assert_close(loss(s, t, keep=keep), loss(s[keep], t[keep]), rtol=0, atol=0)
    targets = topk_targets(t, 3)
    lumped = topk_kl(s, targets, temperature=1.0, keep=keep)
    chosen = topk_kl(s[keep], topk_targets(t[keep], 3), temperature=1.0)
    torch.testing.assert_close(lumped, chosen, rtol=0, atol=0)


# --- the k largest


def lumped_by_hand(p, q, k):
    top = sorted(range(len(p)), key=lambda i: -p[i])[:k]
    p, q = ([*(x[i] for i in top), 1 - sum(x[i] for i in top)] for x in (p, q))
    return kl_by_hand(p, q)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_lumping_is_the_divergence_of_the_merged_distributions(temperature):
    s, t = normal(6), normal(6, seed=1)
    p, q = probabilities(t.tolist(), temperature), probabilities(s.tolist(), temperature)
    for k in range(1, 6):
        found = topk_kl(s, topk_targets(t, k, temperature=temperature), temperature=temperature)
        assert math.isclose(found.item(), lumped_by_hand(p, q, k), rel_tol=1e-9)


@given(st.integers(0, 2**32), st.integers(2, 12), st.floats(0.3, 8.0))
def test_lumping_never_adds_and_finer_lumps_never_lose(seed, count, temperature):
    s, t = normal(3, count, seed=seed), normal(3, count, seed=seed + 1)
    full = forward_kl(s, t, temperature=temperature).item()
    values = [
        topk_kl(s, topk_targets(t, k, temperature=temperature), temperature=temperature).item()
        for k in range(1, count + 1)
    ]
    assert all(a <= b + 1e-12 for a, b in zip(values, [*values[1:], full], strict=True))
    assert values[-1] == pytest.approx(full, abs=1e-12)
    assert values[-2] == pytest.approx(full, abs=1e-12)


def test_renormalized_targets_do_not_see_the_mass_outside():
    t = torch.tensor([3.0, 2.0, 0.0, 0.0])
    s = torch.tensor([3.0, 2.0, 9.0, 9.0])  # right among the first two, and nearly no mass there
    targets = topk_targets(t, 2)
    blind = topk_kl(s, targets, temperature=1.0, renormalize=True)
    assert blind.item() == pytest.approx(0, abs=1e-14)
    assert topk_kl(s, targets, temperature=1.0) > 3


def test_targets_hold_the_teachers_mass_to_the_last_class():
    t = torch.tensor([50.0, 1.0, 0.0, -900.0])
    indices, log_probs, log_rest, temperature = topk_targets(t, 3)
    assert temperature == 1.0
    assert indices.tolist() == [0, 1, 2]
    torch.testing.assert_close(log_probs, t.double().log_softmax(-1)[:3], rtol=0, atol=0)
    assert log_rest.item() == pytest.approx(-950, rel=1e-12)  # 1 - the sum of the rest would be 0
    assert topk_targets(t, 4).log_rest.item() == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_stands_in_padding_does_not_matter(bad):
    s, t = normal(2, 3, 5), normal(2, 3, 5, seed=1)
    labels = torch.tensor([[0, 1, -100], [2, -100, 4]])
    keep = labels != -100
    spoiled = [torch.where(keep[..., None], z, bad).requires_grad_() for z in (s, t)]
    for loss in (
        lambda s, t: distillation_loss(s, t, labels, temperature=2.0, alpha=0.5),
        lambda s, t: forward_kl(s, t, keep=keep),
        lambda s, t: topk_kl(s, topk_targets(normal(2, 3, 5, seed=1), 2), temperature=1, keep=keep),
    ):
        found = loss(*spoiled)
        assert found.item() == loss(s, t).item()
        (gradient,) = torch.autograd.grad(found, spoiled[0])
        assert gradient[keep].abs().max() > 0
        assert gradient[~keep].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_have_the_type_of_their_logits_and_at_least_float32(dtype):
    p = softmax_temperature(torch.tensor([1.0, 2.0], dtype=dtype), 2.0)
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_targets_of_another_temperature_are_refused():
    targets = topk_targets(normal(4, 50), 5, temperature=2.0)
    topk_kl(normal(4, 50), targets, temperature=2.0)
    with pytest.raises(ValueError, match=r"made at temperature 2.0 for a loss at 4.0: .*=4.0\)"):
        topk_kl(normal(4, 50), targets, temperature=4.0)


def test_targets_may_be_stored_in_fewer_bytes():
    s, t = normal(4, 50), normal(4, 50, seed=1)
    for k in (5, 50):
        full = topk_targets(t, k)
        small = TopK(full.indices.int(), full.log_probs.half(), full.log_rest.half())
        assert topk_kl(s, small, temperature=1.0).item() == pytest.approx(
            topk_kl(s, full, temperature=1.0).item(), rel=5e-3
        )  # float16 has 11 bits: each log-probability is within 2**-11 of itself


# --- features


def test_features_are_compared_after_projecting_the_students():
    h, wide, w = normal(10, 3), normal(10, 5, seed=1), normal(5, 3, seed=2)
    by_hand = (h @ w.T - wide).square().mean()
    torch.testing.assert_close(feature_loss(h, wide, w), by_hand, rtol=1e-14, atol=0)
    module = torch.nn.Linear(3, 5, dtype=torch.float64)
    by_hand = (module(h) - wide).square().mean()
    torch.testing.assert_close(feature_loss(h, wide, module), by_hand, rtol=1e-14, atol=0)
    torch.testing.assert_close(feature_loss(h, h + 1.0), torch.tensor(1.0).double())


def test_cosine_distance_is_from_zero_to_two_and_ignores_length():
    h = normal(4, 6, seed=3)
    for scale, expected in [(7.0, 0.0), (-0.1, 2.0)]:
        found = feature_loss(scale * h, h, kind="cosine").item()
        assert found == pytest.approx(expected, abs=1e-12)
    q = torch.eye(2)
    assert feature_loss(q[0], q[1], kind="cosine").item() == pytest.approx(1)


def test_a_dead_student_with_a_dead_projection_is_not_perfect():
    """With the projection on the teacher's side it would be: W = 0 and h_S = 0 have loss 0."""
    wide = normal(10, 5)
    dead = feature_loss(torch.zeros(10, 3), wide, torch.zeros(5, 3))
    assert dead.item() == pytest.approx(wide.square().mean().item())
    assert F.mse_loss(torch.zeros(10, 3), wide.float() @ torch.zeros(3, 5).T) == 0


def test_zero_feature_loss_means_the_teacher_can_be_read_from_the_student():
    """A narrow student cannot reach it: the best loss is the tail of the teacher's spectrum."""
    x = normal(500, 8)
    wide = x @ normal(8, 8, seed=1)
    u, values, _ = torch.linalg.svd(wide, full_matrices=False)
    student = u[:, :3]  # the best three features there are
    w = torch.linalg.lstsq(student, wide).solution.T
    best = feature_loss(student, wide, w)
    assert best.item() == pytest.approx(values[3:].square().sum().item() / wide.numel(), rel=1e-9)


# --- several students, several teachers


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("count", [2, 3])
def test_mutual_losses_are_their_formula(count, temperature):
    logits = [normal(4, 5, seed=i) for i in range(count)]
    y = classes(4)
    found = mutual_losses(logits, y, temperature=temperature, weight=0.7)
    assert found.shape == (count,)
    for i in range(count):
        kls = [
            np.mean(
                [
                    kl_by_hand(probabilities(b, temperature), probabilities(a, temperature))
                    for a, b in zip(logits[i].tolist(), logits[j].tolist(), strict=True)
                ]
            )
            for j in range(count)
            if j != i
        ]
        by_hand = F.cross_entropy(logits[i], y).item() + 0.7 * temperature**2 * np.mean(kls)
        assert found[i].item() == pytest.approx(by_hand, rel=1e-10)


def test_each_mutual_loss_has_a_gradient_in_its_own_student_only():
    logits = [normal(4, 5, seed=i).requires_grad_(True) for i in range(3)]
    losses = mutual_losses(logits, classes(4))
    for i in range(3):
        slopes = torch.autograd.grad(losses[i], logits, retain_graph=True, allow_unused=True)
        assert [s is not None and s.abs().max().item() > 0 for s in slopes] == [
            j == i for j in range(3)
        ]


def test_an_ensemble_predicts_the_mean_of_its_probabilities():
    logits = [normal(4, 5, seed=i) for i in range(3)]
    mixture = torch.stack([z.softmax(-1) for z in logits]).mean(0)
    found = softmax_temperature(ensemble_logits(logits), 1.0)
    torch.testing.assert_close(found, mixture, rtol=1e-13, atol=0)
    torch.testing.assert_close(ensemble_logits(torch.stack(logits)), ensemble_logits(logits))
    geometric = torch.stack(logits).mean(0).softmax(-1)
    assert (geometric - mixture).abs().max() > 0.01


def test_the_gap_of_an_ensemble_to_its_teachers_is_a_jensen_shannon_divergence():
    a, b = normal(4, 5), normal(4, 5, seed=1)
    mixture = ensemble_logits([a, b])
    both = (forward_kl(mixture, a) + forward_kl(mixture, b)) / 2
    torch.testing.assert_close(both, jensen_shannon(a, b), rtol=1e-12, atol=0)


# --- refusals

S, T, Y = normal(4, 5), normal(4, 5, seed=1), classes(4)
SOFT = {"temperature": 2.0, "alpha": 0.5}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: softmax_temperature(S, 0), "temperature=0; .* for instance 4.0"),
        (lambda: softmax_temperature(S, -1.0), r"temperature=-1\.0; .* from 1e-06 to 1e\+06"),
        (lambda: softmax_temperature(S, math.nan), "temperature=nan"),
        (lambda: softmax_temperature(S, math.inf), "temperature=inf; .* logit_matching"),
        (lambda: softmax_temperature(Y, 1.0), r"int64; .* use logits\.float\(\)"),
        (lambda: softmax_temperature(torch.tensor(1.0), 1.0), r"shape \(\); .*\(32, 10\)"),
        (lambda: forward_kl(S[:, :1], T[:, :1]), r"shape \(4, 1\); .* two classes"),
        (lambda: forward_kl(S / 0, T), "contain NaN, infinity .* such as -1e4"),
        (lambda: reverse_kl(S, T * math.nan), "teacher_logits contain NaN"),
        (lambda: forward_kl(S, T[:3]), r"\(4, 5\) and \(3, 5\); they must agree"),
        (lambda: forward_kl(S, T, keep=Y), r"keep is torch.int64 .* labels != -100"),
        (lambda: forward_kl(S, T, keep=torch.ones(3) > 0), r"of shape \(4,\)"),
        (lambda: logit_matching(S, T, keep=Y < 0), "no position is left"),
        (lambda: forward_kl(S[:0], T[:0]), "no position is left"),
        (lambda: distillation_loss(S, T, Y, temperature=2.0, alpha=1.5), "alpha=1.5; .* 0.9"),
        (lambda: distillation_loss(S, T, Y, temperature=2.0, alpha=math.nan), "alpha=nan"),
        (lambda: distillation_loss(S, T, Y, **SOFT, alpha_weighs="kd"), "'kd'; .*\"hard\""),
        (lambda: distillation_loss(S, T, Y.float(), **SOFT), r"labels\.long\(\)"),
        (lambda: distillation_loss(S, T, Y[:3], **SOFT), r"\(3,\) .* they must be \(4,\)"),
        (lambda: distillation_loss(S, T, Y + 5, **SOFT), "labels from .* 0 to 4, and -100"),
        (lambda: distillation_loss(S, T, Y - 9, **SOFT), "labels from -9"),
        (lambda: distillation_loss(S, T, Y * 0 - 100, **SOFT), "no position is left"),
        (lambda: topk_targets(T, 0), "k=0; it must be a number from 1 to 5"),
        (lambda: topk_targets(T, 6), "k=6"),
        (lambda: topk_targets(T, 2.0), "k=2.0"),
        (lambda: topk_kl(S[:3], topk_targets(T, 2), temperature=1.0), r"\(3, 'k'\)"),
        (lambda: topk_kl(S[:, :2], topk_targets(T, 5), temperature=1.0), "name class 4"),
        (lambda: feature_loss(S, T, kind="l1"), "'l1'; .*cosine"),
        (lambda: feature_loss(S, T[:, :3]), r"torch\.nn\.Linear\(5, 3\)"),
        (lambda: feature_loss(S, T[:, :3], torch.ones(5, 3)), r"\(5, 3\) .* use \(3, 5\)"),
        (lambda: feature_loss(S[:0], T[:0]), "not be empty"),
        (lambda: mutual_losses([S], Y), "1 student; it takes at least 2"),
        (lambda: mutual_losses([S, T], Y, weight=-1), "weight=-1; .* 0 or more"),
        (lambda: mutual_losses([S, T], Y - 100), "labels from -100"),
        (lambda: mutual_losses([S, T[:, :4]], Y), "they must agree"),
        (lambda: ensemble_logits([]), "at least one teacher"),
        (lambda: ensemble_logits([S, T[:2]]), "they must agree"),
    ],
)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
