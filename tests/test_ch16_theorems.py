"""Chapter 16: every theorem against a computation that does not use it, and false variants."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from compresskit import methods, theory
from compresskit.affine import QuantSpec, fit_grid
from compresskit.lowrank import Adapter
from compresskit.methods import nf4
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.recipes import adaptation
from compresskit.recipes.language_student import next_byte
from compresskit.sparse import Pattern
from compresskit.train import lora, memory


def rejects(check, false_variant):
    with pytest.raises(AssertionError):
        check(false_variant)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def problem(seed, tokens=4, m=6, n=8, r=3):
    """A layer, tokens, a curved loss of its outputs, and an adapter."""
    weight, x, goal = draw(m, n, seed=seed), draw(tokens, n, seed=seed + 1), draw(tokens, m, seed=9)
    a, b = draw(r, n, seed=seed + 2), draw(m, r, seed=seed + 3)

    def loss(w):
        return (torch.tanh(x @ w.T) - goal).square().sum()

    return weight, a, b, loss


def numeric(function, at, step=1e-6):
    """Central differences: no rule of differentiation is used."""
    gradient = torch.zeros_like(at)
    for index in np.ndindex(*at.shape):
        moved = torch.zeros_like(at)
        moved[index] = step
        gradient[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return gradient


# --- gradients ----------------------------------------------------------------------------------


def check_gradients(rule):
    """`rule` (G, a, b, s) -> gradients of a and of b."""
    scale = 0.7
    for seed in range(3):
        weight, a, b, loss = problem(seed)
        whole = numeric(loss, weight + scale * b @ a)
        of_a, of_b = rule(whole, a, b, scale)
        wanted_a = numeric(lambda a, w=weight, b=b, f=loss: f(w + scale * b @ a), a)
        wanted_b = numeric(lambda b, w=weight, a=a, f=loss: f(w + scale * b @ a), b)
        assert torch.allclose(of_a, wanted_a, rtol=1e-4, atol=1e-5)
        assert torch.allclose(of_b, wanted_b, rtol=1e-4, atol=1e-5)


def gradients(whole, a, b, scale):
    return scale * b.T @ whole, scale * whole @ a.T


@pytest.mark.theorem("thm-lora-gradients")
def test_gradients_of_an_adapter_its_first_step_and_its_rank():
    check_gradients(gradients)
    for tokens in (1, 3, 20):
        weight, a, b, loss = problem(1, tokens=tokens)
        free = weight.clone().requires_grad_()
        loss(free).backward()
        assert torch.linalg.matrix_rank(free.grad) == min(tokens, 6)
        start = torch.zeros_like(b).requires_grad_()
        seen = a.clone().requires_grad_()
        loss(weight + 0.7 * start @ seen).backward()
        assert not seen.grad.any()
        moved = 0.7 * (start.detach() - 0.1 * start.grad) @ (a - 0.1 * seen.grad)
        torch.testing.assert_close(moved, -0.1 * 0.7**2 * free.grad @ a.T @ a)
    a, b = (torch.zeros_like(t).requires_grad_() for t in (a, b))
    loss(weight + b @ a).backward()
    assert not a.grad.any()
    assert not b.grad.any()
    optimizer = torch.optim.Adam([a := draw(3, 8).requires_grad_(), b], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        loss(weight + b @ a).backward()
        optimizer.step()
    assert torch.linalg.matrix_rank(b @ a) <= 3


@pytest.mark.false_variant("thm-lora-gradients")
def test_gradients_without_the_scale_swapped_or_projected_are_rejected():
    rejects(check_gradients, lambda g, a, b, s: (b.T @ g, g @ a.T))
    rejects(check_gradients, lambda g, a, b, s: (s**2 * b.T @ g, s**2 * g @ a.T))
    rejects(check_gradients, lambda g, a, b, s: (s * torch.linalg.pinv(b) @ g, s * g @ a.T))


def check_scale(rule):
    """`rule` (alpha, r, n, stabilized) -> factor of -eta G in the mean of the first step."""
    n, gradient = 12, draw(5, 12)
    for r, stabilized in ((2, False), (8, False), (2, True), (8, True)):
        alpha, generator = 4.0, torch.Generator().manual_seed(0)
        a = (2 * torch.rand(20_000, r, n, generator=generator).double() - 1) / math.sqrt(n)
        scale = Adapter(torch.zeros(r, n), torch.zeros(5, r), alpha, stabilized).scale
        mean = scale**2 * (a.mT @ a).mean(0)
        found = (gradient @ mean * gradient).sum() / gradient.square().sum()
        assert found.item() == pytest.approx(rule(alpha, r, n, stabilized), rel=0.02)


@pytest.mark.theorem("thm-lora-scale")
def test_the_mean_of_the_first_step():
    check_scale(lambda alpha, r, n, stable: alpha**2 / (3 * n) / (1 if stable else r))
    layer = torch.nn.Linear(400, 60)
    a = lora.start(layer, [""], rank=50)[""].a
    assert a.var().item() == pytest.approx(1 / (3 * 400), rel=0.02)


@pytest.mark.false_variant("thm-lora-scale")
def test_a_step_without_rank_without_a_third_or_with_alpha_alone_is_rejected():
    rejects(check_scale, lambda alpha, r, n, stable: alpha**2 / (3 * n))
    rejects(check_scale, lambda alpha, r, n, stable: alpha**2 / n / (1 if stable else r))
    rejects(check_scale, lambda alpha, r, n, stable: alpha**2 * r / (3 * n))


# --- merging ------------------------------------------------------------------------------------


def check_merge(threshold):
    """Updates below `threshold` * step vanish on a grid, and some larger ones do not."""
    grid = fit_grid(draw(8, 64).float(), QuantSpec(4, group_size=16))
    start = grid.code(grid.nearest(draw(8, 64).float())).decode()
    inside = (grid.nearest(start) > 0) & (grid.nearest(start) < 15)
    step = grid.by_column()[0]
    for share in (0.2, 0.45, 0.49, 0.55, 0.9):
        update = share * step * torch.sign(draw(8, 64, seed=1).float())
        merged = grid.code(grid.nearest(start + update)).decode()
        if share < threshold:
            assert torch.equal(merged, start)
        else:
            assert (merged != start)[inside].all()


@pytest.mark.theorem("thm-lora-merge")
def test_merging_is_exact_in_reals_and_nothing_below_half_a_step():
    weight, a, b, _ = problem(0)
    x = draw(5, 8)
    torch.testing.assert_close(x @ weight.T + (x @ a.T) @ b.T, x @ (weight + b @ a).T)
    check_merge(0.5)
    for seed in range(3):
        half = draw(200, 50, seed=seed).bfloat16()
        half[0] = 2.0 ** torch.arange(-25, 25)  # powers of two have the nearest neighbors
        for sign in (-1, 1):
            update = sign * 0.999 * 2.0**-10 * half.float().abs()
            assert torch.equal((half.float() + update).bfloat16(), half)
    assert theory.vanished([0.4, -0.6], [1.0, 1.0]) == 0.5


@pytest.mark.false_variant("thm-lora-merge")
def test_a_whole_step_a_quarter_and_a_larger_share_of_bfloat16_are_rejected():
    rejects(check_merge, 1.0)
    rejects(check_merge, 0.25)
    powers = (2.0 ** torch.arange(-20.0, 20)).bfloat16()
    update = -(2.0**-8) * powers.float()
    assert not torch.equal((powers.float() + update).bfloat16(), powers)


@pytest.mark.theorem("prop-lora-count")
def test_what_adapters_add_and_that_merging_fills_zeros():
    shapes = {"a": (30, 20), "b": (7, 50)}
    net = torch.nn.ModuleDict({k: torch.nn.Linear(n, m) for k, (m, n) in shapes.items()})
    for r in (1, 5):
        found = lora.start(net, list(shapes), rank=r)
        assert sum(a.count for a in found.values()) == r * sum(m + n for m, n in shapes.values())
        merged = lora.merged(lora.attach(net, found))
        assert sum(p.numel() for p in merged.parameters()) == sum(
            p.numel() for p in net.parameters()
        )
    sparse = methods.magnitude(draw(30, 20).float(), pattern=Pattern(0.9)).decode()
    adapter = Adapter(draw(2, 20).float(), draw(30, 2).float(), 1.0)
    assert adapter.merged(sparse).count_nonzero() == 600
    assert sparse.count_nonzero() == 60


@pytest.mark.theorem("prop-lora-memory")
def test_the_bytes_of_weights_gradients_and_averages():
    shape = DecoderConfig(width=64, layers=1, heads=2, kv_heads=2, hidden=96, context=16)
    torch.manual_seed(0)
    base = Decoder(shape)
    frozen = sum(p.numel() for p in base.parameters())
    ids = torch.arange(32).reshape(2, 16)
    for rank in (2, 4):
        names = lora.linear_layers(base)
        net = lora.attach(base, lora.start(base, names, rank=rank))
        trained = rank * sum(sum(layer.weight.shape) for layer in names.values())
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad])
        held = memory.measured(net, next_byte, (ids, ids), optimizer)
        assert sum(held[:3]) == 4 * frozen + 16 * trained
        assert (
            held.activations
            == sum(adaptation.activations(shape, 2, rank=rank, dropout=True).values())
            - 2 * 4 * 32 * 64
        )  # dropout of probability 0 keeps no mask
    code = nf4(draw(256, 512).float())
    bits = 8 * code.nbytes / (256 * 512)
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


# --- what a rank can reach ----------------------------------------------------------------------


def check_limit(rule):
    """`rule` (D, C, r) -> least loss, against descent from several starts."""
    for seed, r in ((0, 1), (1, 2), (2, 3)):
        goal, root = draw(5, 6, seed=seed), draw(6, 6, seed=seed + 20)
        best = math.inf
        for start in range(3):
            factors = [draw(5, r, seed=start).requires_grad_(), draw(r, 6, seed=7).requires_grad_()]
            optimizer = torch.optim.LBFGS(factors, max_iter=1000, line_search_fn="strong_wolfe")

            def error(factors=factors, optimizer=optimizer, goal=goal, root=root):
                optimizer.zero_grad()
                value = ((goal - factors[0] @ factors[1]) @ root).square().sum()
                value.backward()
                return value

            optimizer.step(error)
            best = min(best, error().item())
        assert best == pytest.approx(rule(goal, root @ root.T, r), rel=1e-3)


@pytest.mark.theorem("thm-lora-limit")
def test_the_least_loss_of_a_rank():
    def least(goal, second, r):
        values = torch.linalg.svdvals(goal @ torch.linalg.cholesky(second))
        return theory.truncation(values, r).squared

    check_limit(least)
    rotation = torch.linalg.qr(draw(16, 16)).Q
    for r in (1, 4, 15):
        values = torch.linalg.svdvals(rotation)
        assert theory.truncation(values, r).squared / 16 == pytest.approx(1 - r / 16)
    x = torch.linalg.qr(draw(64, 16)).Q * 8
    layer = torch.nn.Linear(16, 16, bias=False).double()
    torch.nn.init.zeros_(layer.weight)
    free = layer.weight
    F.mse_loss(x @ rotation.T, layer(x)).backward()
    assert free.grad.any()


@pytest.mark.false_variant("thm-lora-limit")
def test_limits_without_the_moments_or_with_another_rank_are_rejected():
    def plain(goal, second, r):
        return theory.truncation(torch.linalg.svdvals(goal), r).squared

    def moments_themselves(goal, second, r):
        return theory.truncation(torch.linalg.svdvals(goal @ second), r).squared

    def one_more(goal, second, r):
        values = torch.linalg.svdvals(goal @ torch.linalg.cholesky(second))
        return theory.truncation(values, r + 1).squared

    for variant in (plain, moments_themselves, one_more):
        rejects(check_limit, variant)
