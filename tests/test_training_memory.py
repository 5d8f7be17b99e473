"""What training holds: 8-bit averages, counted and predicted bytes, and random subspaces."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compresskit.codebook import TABLES
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.recipes import adaptation
from compresskit.recipes.language_student import next_byte
from compresskit.train import AdamW8bit, Shuffled, Subspace, fit, lora, memory


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- 8-bit averages -----------------------------------------------------------------------------


def test_the_unsigned_table_is_the_signed_one_with_twice_as_many_steps():
    signed, unsigned = TABLES["dynamic8"], TABLES["dynamic8 unsigned"]
    assert len(signed) == len(unsigned) == 256
    assert (unsigned.diff() > 0).all()
    assert unsigned[0] == 0
    assert unsigned[-1] == 1
    positive = signed[signed > 0]
    # The mean of two neighbors of the finer table is an entry of the coarser one.
    finer = unsigned[1:-1]
    torch.testing.assert_close((finer[0::2] + finer[1::2]) / 2, positive[:-1])


def run(optimizer, steps=150, **options):
    weight = nn.Parameter(draw(64, 80))
    goal, x = draw(64, 80, seed=1), draw(200, 80, seed=2)
    stepper = optimizer([weight], lr=2e-2, weight_decay=0.01, **options)
    for _ in range(steps):
        stepper.zero_grad()
        F.mse_loss(x @ weight.T, x @ goal.T).backward()
        stepper.step()
    return weight.detach(), stepper


def test_small_parameters_are_updated_as_by_adamw():
    usual, _ = run(torch.optim.AdamW)
    ours, stepper = run(AdamW8bit, smallest=10**6)
    torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-5)
    assert all(t.dtype == torch.float32 for t in tensors(stepper))


def tensors(optimizer):
    states = optimizer.state.values()
    return [t for state in states for t in state.values() if isinstance(t, torch.Tensor)]


def test_eight_bits_follow_adamw_and_take_a_quarter():
    usual, plain = run(torch.optim.AdamW)
    ours, stepper = run(AdamW8bit)
    goal = draw(64, 80, seed=1)
    assert (ours - usual).norm() < 0.05 * (usual - draw(64, 80)).norm()
    assert (ours - goal).norm().item() == pytest.approx((usual - goal).norm().item(), rel=0.1)
    held = [sum(t.nbytes for t in tensors(o) if t.ndim) for o in (plain, stepper)]
    assert held == [8 * 5120, 2 * 5120 + 2 * 4 * 20]


def test_a_second_average_is_never_rounded_to_zero():
    weight = nn.Parameter(torch.zeros(64, 80))
    stepper = AdamW8bit([weight], lr=1e-3, weight_decay=0.0)
    weight.grad = torch.full((64, 80), 1e-6)
    weight.grad[0, 0] = 1.0
    stepper.step()
    weight.grad = weight.grad * 0.5
    stepper.step()
    assert torch.isfinite(weight).all()
    assert weight.abs().max() < 1.0


def test_a_run_that_was_stopped_goes_on_as_if_it_was_not(tmp_path):
    def trained(steps_first):
        torch.manual_seed(0)
        model = nn.Linear(80, 64)
        data = Shuffled(draw(50, 80), draw(50, 64, seed=1), size=10, steps=12)
        options = {"optimizer": AdamW8bit, "every": 6, "checkpoint": tmp_path / str(steps_first)}

        def loss(m, b):
            if steps_first and len(calls) == steps_first:
                raise KeyboardInterrupt
            calls.append(0)
            return F.mse_loss(m(b[0]), b[1])

        calls = []
        try:
            fit(model, loss, data, **options)
        except KeyboardInterrupt:
            steps_first = 0
            fit(model, loss, data, **options)
        return model.weight.detach()

    assert torch.equal(trained(0), trained(9))


def test_options_out_of_range_are_refused():
    weight = [nn.Parameter(torch.zeros(2))]
    for bad in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": 0}, {"weight_decay": -1}):
        with pytest.raises(ValueError, match="for instance"):
            AdamW8bit(weight, **bad)


# --- bytes --------------------------------------------------------------------------------------

SHAPE = DecoderConfig(width=32, layers=2, heads=2, kv_heads=2, hidden=48, context=16, dropout=0.1)


def small(kind, rank=0):
    torch.manual_seed(0)
    model = Decoder(SHAPE).train()
    if not rank:
        return model
    base = adaptation.four_bit(model) if kind == "QLoRA" else model
    return lora.attach(base, lora.start(base, lora.linear_layers(model), rank=rank)).train()


@pytest.mark.parametrize(("kind", "rank"), [("full", 0), ("LoRA", 1), ("LoRA", 4), ("QLoRA", 4)])
def test_the_bytes_of_a_step_are_those_predicted(kind, rank):
    model, ids = small(kind, rank), torch.arange(48).reshape(3, 16)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    found = memory.measured(model, next_byte, (ids, ids), optimizer)
    expected = memory.predicted(model)
    assert found[:3] == expected[:3]
    assert found.activations == sum(adaptation.activations(SHAPE, 3, rank=rank).values())
    assert found.total == sum(found)


def test_without_dropout_no_masks_are_kept():
    model, ids = small("full").eval(), torch.arange(48).reshape(3, 16)
    optimizer = torch.optim.AdamW(model.parameters())
    found = memory.measured(model, next_byte, (ids, ids), optimizer)
    assert found.activations == sum(adaptation.activations(SHAPE, 3, dropout=False).values())


def test_a_base_in_four_bits_takes_its_codes_bytes():
    dense, coded = (small(kind, 4) for kind in ("LoRA", "QLoRA"))
    count = sum(m.weight.numel() for m in lora.linear_layers(dense).values())
    saved = memory.predicted(dense).weights - memory.predicted(coded).weights
    codes = sum(m.base.code.nbytes for m in lora.linear_layers(coded).values())
    assert saved == 4 * count - codes
    assert codes < 0.75 * count


# --- random subspaces ---------------------------------------------------------------------------


def test_a_subspace_moves_along_orthonormal_directions():
    torch.manual_seed(0)
    model = Subspace(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), 7)
    assert sum(p.requires_grad for p in model.parameters()) == 1
    order, total = model.order, 31
    matrix = torch.stack([model.move(row) for row in torch.eye(7)], dim=1)
    assert matrix.shape == (total, 7)
    assert order >= total
    gram = matrix.T @ matrix
    assert (gram.diagonal() - total / order).abs().max() < 1e-6
    assert (gram - torch.diag(gram.diagonal())).abs().max() <= (order - total) / order + 1e-6


def test_in_the_whole_space_a_step_is_that_of_the_weights():
    torch.manual_seed(0)
    net, x = nn.Linear(3, 1), draw(6, 3)  # 4 parameters, a Hadamard order
    model = Subspace(net, 4)
    model(x).square().mean().backward()
    net(x).square().mean().backward()
    ours = model.move(model.z.grad)
    theirs = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(ours, theirs)


def test_a_subspace_trains_and_becomes_an_ordinary_model():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)), draw(64, 6)
    y = x[:, :1] - x[:, 1:2]
    model = Subspace(net, 30, seed=3)
    before = {n: p.clone() for n, p in model.model.named_parameters()}
    data = Shuffled(x, y, size=64, steps=60)
    losses = fit(model, lambda m, b: F.mse_loss(m(b[0]), b[1]), data, rate=5e-2).losses
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.model.named_parameters())
    moved = model.moved()
    torch.testing.assert_close(moved(x), model(x))
    assert type(moved) is nn.Sequential
    assert all(p.requires_grad for p in moved.parameters())
    other = copy.deepcopy(model.z.detach())
    assert not torch.equal(Subspace(net, 30, seed=4).move(other), model.move(other))


def test_a_dimension_out_of_range_is_refused():
    for bad in (0, 5, 2.0):
        with pytest.raises(ValueError, match="use 1 to 4"):
            Subspace(nn.Linear(3, 1), bad)


# --- the recipe ---------------------------------------------------------------------------------


def test_the_recipe_refuses_what_it_does_not_know():
    known = {"domain": "code", "seed": 0, "rate": 1e-3, "steps": 1}
    for bad in ({"way": "half"}, {"way": "LoRA"}, {"way": "full", "rank": 4}):
        with pytest.raises(ValueError, match="the ways are"):
            adaptation.adapted(**known, **bad)
    with pytest.raises(ValueError, match="domain"):
        adaptation.texts("poems")


def test_what_is_trained_is_what_a_way_says():
    counts = {}
    for way, rank, where in (
        ("full", 0, "all"), ("matrices", 0, "all"), ("LoRA", 8, "all"), ("QLoRA", 8, "all"),
        ("LoRA", 40, "q, v"), ("DoRA", 8, "all"),
    ):  # fmt: skip
        model = adaptation.prepared(way, rank, where)
        counts[way, where] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["full", "all"] == 1_312_384
    assert counts["matrices", "all"] == 1_312_384 - 256 * 128 - 13 * 128
    assert counts["LoRA", "all"] == counts["QLoRA", "all"] == counts["LoRA", "q, v"] == 122_880
    assert counts["DoRA", "all"] == 122_880 + 6 * (5 * 128 + 2 * 384)


def test_the_new_texts_are_new():
    (inputs, _), calibration, test = adaptation.texts("code")
    assert len(inputs) > 5_000
    assert len(calibration) == len(test) == adaptation.HELD_OUT
    known = adaptation.texts("manual")[2]
    permuted = adaptation.texts("permuted")[2]
    assert torch.equal(permuted, adaptation.permutation()[known])
    assert (adaptation.permutation().sort().values == torch.arange(256)).all()
