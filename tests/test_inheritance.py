"""compresskit.recipes.inheritance: fresh inputs, classes of students, what is measured of them."""

import numpy as np
import pytest
import torch

from compresskit import data, models, theory
from compresskit.model import decoded, size_table
from compresskit.recipes import inheritance as lab


@pytest.fixture(scope="module")
def few():
    return lab.sample(60, 0)


@pytest.mark.slow
def test_the_scale_is_that_of_the_books_data_set():
    """Its 5000 lines, drawn again and scaled by these constants, are the same 5000 lines."""
    lines = lab._lines(np.repeat(lab._generator()[0]["y"], 500), 42)
    center, scale = lab._constants()
    samples = data.mnist1d()
    book = torch.cat([samples.train_x, samples.test_x]).double().norm(dim=1).sort().values
    ours = torch.tensor((lines - center) / scale).norm(dim=1).sort().values
    torch.testing.assert_close(ours, book, rtol=1e-5, atol=0)  # the book's are float32


def test_a_sample_depends_on_its_seed_alone(few):
    lab.sample.cache_clear()
    state = np.random.get_state()[1].copy()
    again = lab.sample(60, 0)
    assert torch.equal(again.x, few.x)
    assert torch.equal(again.y, few.y)
    assert not torch.equal(lab.sample(60, 1).x, few.x)
    assert (np.random.get_state()[1] == state).all()


def test_no_fresh_input_is_in_the_books_data_set(few):
    samples = data.mnist1d()
    known = torch.cat([samples.train_x, samples.test_x])
    assert torch.cdist(few.x, known).min() > 0.1


def test_the_books_teacher_is_as_good_on_fresh_inputs_as_on_its_test_set(few):
    p = lab.probabilities(models.mnist1d_cnn(), few.x)
    assert lab.error(p, few.y) < 0.15  # 4 % expected, of 60


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_a_ball_never_leaves_its_radius(size):
    ball = lab.Ball(5, 3, 2.0)
    ball.weight.data.mul_(size / ball.weight.norm())
    assert ball.matrix.norm().item() == pytest.approx(min(size, 2.0), rel=1e-5)
    x = torch.eye(5)
    torch.testing.assert_close(ball(x), ball.matrix.T)


def test_the_inputs_of_linear_students_have_the_norm_that_the_bound_takes(few):
    assert lab.unit_lines(few.x).norm(dim=1).sub(2**0.5).abs().max() < 1e-6
    assert lab.book_discriminants()(few.x).shape == (60, 9)
    assert lab.book_discriminants()(few.x).norm(dim=1).sub(1).abs().max() < 1e-6


def test_discriminants_keep_the_classes_apart():
    samples = data.mnist1d()
    features = lab.book_discriminants()(samples.train_x)
    means = torch.stack([features[samples.train_y == k].mean(0) for k in range(10)])
    nearest = torch.cdist(features, means).argmin(1)
    assert (nearest == samples.train_y).float().mean() > 0.9


def test_a_student_comes_closer_to_its_teacher(few):
    teacher = lab.book_teacher()
    student = lab.network(40, 16, 10, seed=0)
    p = lab.probabilities(teacher, few.x)
    before = theory.divergence_term(p, lab.probabilities(student, few.x))
    lab.taught(student, teacher, few.x, seed=0, steps=50)
    assert theory.divergence_term(p, lab.probabilities(student, few.x)) < 0.7 * before


def test_first_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    a = lab.network(4, 3, 2, seed=1)
    torch.manual_seed(6)
    b = lab.network(4, 3, 2, seed=1)
    assert torch.equal(a[0].weight, b[0].weight)
    assert not torch.equal(a[0].weight, lab.network(4, 3, 2, seed=2)[0].weight)


def test_rounding_counts_every_byte_of_the_student():
    small = lab.rounded(lab.network(40, 32, 32, 10, seed=0))
    weights, rows = 40 * 32 + 32 * 32 + 32 * 10, 32 + 32 + 10
    assert size_table(small).nbytes == weights // 2 + 2 * rows + 4 * rows + 3  # one zero each
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert decoded(small)(x).shape == (5, 10)


def test_the_norm_bound_is_about_a_network_that_it_contains():
    """A network with biases is one without, on inputs with a constant: same outputs, same norms."""
    network = lab.network(4, 3, 2, seed=0)
    first, last = network[0], network[2]
    w = torch.cat([first.weight, first.bias[:, None]], 1)
    w = torch.cat([w, torch.tensor([[0.0, 0, 0, 0, 1]])])
    v = torch.cat([last.weight, last.bias[:, None]], 1)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    one = torch.cat([x, torch.ones(6, 1)], 1)
    torch.testing.assert_close(torch.relu(one @ w.T) @ v.T, network(x))
    norms, rows = [w.norm().item()], v.norm(dim=1).sum().item()
    expected = theory.network_complexity(norms, rows, 2.0, 100)
    assert lab.norm_complexity(network, 2.0, 100) == pytest.approx(expected, rel=1e-6)


def test_ascent_finds_more_than_it_starts_with(few):
    p = lab.probabilities(lab.book_teacher(), few.x)
    signs = np.where(np.arange(60) % 2, 1.0, -1.0)
    start = lab.ascent((40, 8, 10), few.x, p, signs, seed=0, steps=1, rate=1e-9)
    assert lab.ascent((40, 8, 10), few.x, p, signs, seed=0, steps=60) > start + 0.05


@pytest.mark.parametrize("kind", ["overfit", "regularized", "tiny"])
def test_no_poor_teacher_learns_from_the_inputs_of_its_student(kind, monkeypatch):
    asked = []

    def lesson(count, seed):
        asked.append((count, seed))
        return torch.zeros(1, 40), torch.zeros(1), 0

    monkeypatch.setattr(lab, "lesson", lesson)
    monkeypatch.setattr(lab, "trained", lambda model, x, y, **settings: model)
    for seed in range(5):
        lab.poor_teacher.__wrapped__(kind, seed)
    assert len(asked) == 5
    assert not {seed for _, seed in asked} & {*range(5), lab.HELD_OUT_SEED}


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: lab.small_student(width=2, way="both", seed=0, count=60), "way='both'; use"),
        (lambda: lab.pupil(arm="genius", seed=0), "arm='genius'; the arms are 'labels'"),
    ],
)
def test_an_unknown_way_is_refused(call, why, monkeypatch):
    monkeypatch.setattr(lab, "lesson", lambda count, seed: (torch.zeros(1, 40), torch.zeros(1), 0))
    with pytest.raises(ValueError, match=why):
        call()
