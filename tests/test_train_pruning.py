"""Training with zeros: what is removed stays so, how many go, and what penalties leave."""

import copy
import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compresskit import container
from compresskit.model import decoded, size_table
from compresskit.train import (
    Cubic,
    Shuffled,
    converted,
    expected_l0,
    fewer,
    fit,
    gated,
    gradual,
    iterative_magnitude,
    l1_norm,
    masked,
    masks_of,
    proximal_l1,
    soft_threshold,
    support,
    unmasked,
)
from compresskit.train.sparsity import BETA, GAMMA, ZETA


def net(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(),
                             nn.Linear(7, 3))  # fmt: skip


def conv():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def batches(steps, x=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=generator) if x is None else x
    return Shuffled(x, torch.arange(len(x)) % 3, size=16, steps=steps)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def some_masks(model, share=0.5):
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.rand(mask.shape, generator=generator) < share
        for name, mask in support(model).items()
    }


def counts(masks):
    return [int(mask.sum()) for mask in masks.values()]


# --- fixed masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_removed_weights_have_no_gradient_and_stay_zero_under_adamw(decay):
    model = net()
    masks = some_masks(model)
    trained = masked(model, masks)
    loss(trained, batches(1)[0]).backward()
    for name, mask in masks.items():
        original = trained.get_submodule(name).parametrizations.weight.original
        assert (original.grad[~mask] == 0).all()
        assert (original.grad[mask] != 0).any()
    fit(trained, loss, batches(30), rate=0.05, decay=decay)
    for name, mask in masks.items():
        weight = trained.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight[mask], model.get_submodule(name).weight[mask])


def test_momentum_of_a_weight_does_not_bring_it_back():
    trained = masked(net(), {"0": torch.ones(10, 6, dtype=torch.bool)})
    kind = trained[0].parametrizations.weight
    optimizer = torch.optim.AdamW(trained.parameters(), lr=0.1)
    for step in range(6):
        if step == 3:
            kind[0].mask[0] = False
            before = kind.original[0].detach().clone()
        optimizer.zero_grad()
        loss(trained, batches(1)[0]).backward()
        optimizer.step()
    assert not torch.equal(kind.original[0], before)  # the moments still move what is behind
    assert (trained[0].weight[0] == 0).all()


def test_kept_weights_get_the_gradient_of_the_network_with_zeros():
    model = net()
    masks = some_masks(model)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            plain.get_submodule(name).weight *= mask
    trained = masked(model, masks)
    for one in (plain, trained):
        loss(one, batches(1)[0]).backward()
    for name, mask in masks.items():
        ours = trained.get_submodule(name).parametrizations.weight.original.grad
        assert torch.equal(ours, plain.get_submodule(name).weight.grad * mask)


def test_a_removed_weight_that_is_not_finite_does_no_harm():
    model, masks = net(), {"0": torch.ones(10, 6, dtype=torch.bool)}
    masks["0"][0, 0] = False
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    trained = masked(model, masks)
    loss(trained, batches(1)[0]).backward()
    assert trained[0].weight.isfinite().all()
    assert trained[0].parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("make", [net, conv])
def test_what_is_stored_computes_bit_for_bit_what_was_trained(make, tmp_path):
    model = make()
    x = torch.randn(8, 6) if make is net else torch.randn(8, 1, 4, 4)
    trained = masked(model, some_masks(model))
    fit(trained, loss, batches(5, x), rate=0.05)
    trained.eval()
    stored = converted(trained)
    with torch.no_grad():
        assert torch.equal(stored(x), trained(x))
        assert torch.equal(decoded(stored)(x), trained(x))
        assert torch.equal(unmasked(trained)(x), trained(x))
        container.save(stored, tmp_path / "m.ckit")
        assert torch.equal(container.load(tmp_path / "m.ckit", make())(x), trained(x))


def test_stored_weights_are_those_kept_and_the_mask():
    masks = {"0": torch.ones(10, 6, dtype=torch.bool)}
    masks["0"][1:] = False
    stored = converted(masked(net(), masks))
    assert stored[0].code.values.shape == (6,)
    assert size_table(stored).compressed_nbytes < 6 * 4 + 60 / 8 + 1


def test_unmasked_layers_are_plain_and_trainable():
    model = unmasked(masked(net(), some_masks(net())))
    assert list(model.state_dict()) == list(net().state_dict())
    before = (model[0].weight == 0).sum()
    fit(model, loss, batches(1), rate=0.05)
    assert (model[0].weight == 0).sum() < before


def test_masks_that_do_not_fit_are_refused():
    good = torch.ones(10, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"give torch.bool of its matrix's shape \(10, 6\)"):
        masked(net(), {"0": good.float()})
    with pytest.raises(ValueError, match=r"shape \(6, 10\), for layer '0'"):
        masked(net(), {"0": good.T})
    with pytest.raises(ValueError, match=r"no layer is named \['1'\]"):
        masked(net(), {"1": good})
    with pytest.raises(ValueError, match="computed from other parameters"):
        masked(masked(net(), {"0": good}), {"0": good})


# --- the loop's two additions -------------------------------------------------------------------


def test_after_sees_every_update_with_its_rate():
    seen = []
    fit(net(), loss, batches(4), rate=0.2, after=lambda m, done, rate: seen.append((done, rate)))
    assert [done for done, _ in seen] == [1, 2, 3, 4]
    assert [rate for _, rate in seen] == pytest.approx(
        [0.2 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    )


def test_a_run_from_a_later_step_uses_the_later_batches_and_rates():
    late, rates = net(), []
    run = fit(late, loss, batches(10), start=7, after=lambda m, done, rate: rates.append(rate))
    assert len(run.losses) == 3
    assert rates[0] == pytest.approx(1e-3 * (1 + math.cos(0.7 * math.pi)) / 2)
    with torch.no_grad():
        assert run.losses[0] == loss(net(), batches(10)[7]).item()
    with pytest.raises(ValueError, match="start=10 of 10 steps; from 0, the first, to 9"):
        fit(net(), loss, batches(10), start=10)


# --- the gradual schedule -----------------------------------------------------------------------


def test_the_cubic_schedule_is_the_hand_table():
    schedule = Cubic(0.9, first=100, count=4, every=50, initial=0.1)
    # 0.9 - 0.8 (1 - k/4)^3 for k = 0 ... 4: 0.8 times 1, 27/64, 1/8, 1/64, 0
    table = {99: 0, 100: 0.1, 150: 0.5625, 200: 0.8, 250: 0.8875, 300: 0.9, 10**6: 0.9}
    assert {t: pytest.approx(schedule.sparsity(t)) for t in table} == table
    assert schedule.last == 300
    assert [t for t in range(400) if schedule.removes(t)] == [100, 150, 200, 250, 300]


def test_the_schedule_never_falls_and_slows_down():
    schedule = Cubic(0.95, first=3, count=10, every=2)
    values = [schedule.sparsity(t) for t in range(3, 24, 2)]
    steps = np.diff(values)
    assert (steps > 0).all()
    assert (np.diff(steps) < 0).all()


@pytest.mark.parametrize("pooled", [False, True])
def test_gradual_pruning_removes_the_scheduled_number_at_every_event(pooled):
    schedule, seen = Cubic(0.8, first=2, count=3, every=4), {}

    def watched(model, inner_loss, data, *, after):
        def both(model, done, rate):
            after(model, done, rate)
            seen[done] = counts(masks_of(model))

        return fit(model, inner_loss, data, rate=0.05, after=both)

    model, _ = gradual(net(), loss, batches(20), schedule=schedule, pooled=pooled, fit=watched)
    sizes = [60, 70, 21]
    for done, kept in seen.items():
        event = max((t for t in range(done + 1) if schedule.removes(t)), default=0)
        share = schedule.sparsity(event)
        if pooled:
            assert sum(kept) == 151 - round(share * 151)
        else:
            assert kept == [n - round(share * n) for n in sizes]
    assert counts(support(unmasked(model))) == counts(masks_of(model))


def test_gradual_pruning_keeps_the_largest_of_the_latent_weights():
    once = Cubic(0.5, first=1, count=1, every=1)
    model, _ = gradual(
        net(), loss, batches(3), schedule=once, fit=partial(fit, rate=1e-9), names=["0"]
    )
    weight = net()[0].weight.abs()
    assert weight[masks_of(model)["0"]].min() > weight[~masks_of(model)["0"]].max()
    assert list(masks_of(model)) == ["0"]


def test_a_weight_that_was_removed_may_return_before_the_end():
    masks = []

    def watched(model, inner_loss, data, *, after):
        def both(model, done, rate):
            original = model[0].parametrizations.weight.original
            if done == 2:  # what was removed at 1 is made the largest
                original[~model[0].parametrizations.weight[0].mask] = 9.0
            after(model, done, rate)
            masks.append(masks_of(model)["0"].clone())

        return fit(model, inner_loss, data, after=both)

    gradual(net(), loss, batches(4), schedule=Cubic(0.5, 1, 1, 1, 0.3), names=["0"], fit=watched)
    assert masks[1][~masks[0]].all()


def test_gradual_pruning_killed_and_resumed_is_the_same(tmp_path):
    schedule = Cubic(0.8, first=2, count=3, every=2)
    options = {"schedule": schedule}

    class Killed(Exception):
        pass

    class Dying(Shuffled):
        def __getitem__(self, step):
            if step == 7:
                raise Killed
            return super().__getitem__(step)

    whole = batches(12)
    loop = partial(fit, rate=0.05, checkpoint=tmp_path / "c", every=3)
    with pytest.raises(Killed):
        gradual(net(), loss, Dying(*whole.tensors, size=16, steps=12), fit=loop, **options)
    resumed, _ = gradual(net(), loss, whole, fit=loop, **options)
    straight, _ = gradual(net(), loss, whole, fit=partial(fit, rate=0.05), **options)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_schedules_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"0 <= initial <= final < 1 is needed, such as 0 and 0.9"):
        Cubic(1.0, 1, 1, 1)
    with pytest.raises(ValueError, match=r"initial=0.9, final=0.5"):
        Cubic(0.5, 1, 1, 1, 0.9)
    with pytest.raises(ValueError, match="each must be 1 or more, such as 100, 10 and 50"):
        Cubic(0.5, 0, 1, 1)
    with pytest.raises(ValueError, match="removed after 8 updates and there are 8; give more"):
        gradual(net(), loss, batches(8), schedule=Cubic(0.5, 2, 3, 2))


def test_going_back_to_weights_from_before_the_end_of_pruning_is_refused():
    steady = iter(range(100))
    loop = partial(fit, evaluate=lambda model: {"n": next(steady)}, every=3)  # the first is best
    with pytest.raises(ValueError, match="give it no `evaluate`"):
        gradual(net(), loss, batches(12), schedule=Cubic(0.5, 2, 3, 2), fit=loop)


# --- iterative pruning --------------------------------------------------------------------------

LOOP = partial(fit, rate=0.05)


@pytest.mark.parametrize("pooled", [False, True])
def test_each_round_removes_the_rounded_share_of_what_remains(pooled):
    found = iterative_magnitude(
        net(), loss, batches(6), rounds=5, rate=0.3, pooled=pooled, halved=["4"], fit=LOOP
    )
    sizes = [[130], [21]] if pooled else [[60], [70], [21]]
    rates = [0.3] * (len(sizes) - 1) + [0.15]
    for number, one in enumerate(found.rounds):
        kept = counts(one.masks)
        assert ([sum(kept[:2]), kept[2]] if pooled else kept) == [n for (n,) in sizes]
        sizes = [[n - round(r * n)] for (n,), r in zip(sizes, rates, strict=True)]
        assert number == 0 or kept != counts(found.rounds[number - 1].masks)


@pytest.mark.parametrize("rewind", [0, 4])
def test_masks_only_shrink_and_removed_weights_stay_zero(rewind):
    found = iterative_magnitude(net(), loss, batches(9), rounds=4, rewind=rewind, fit=LOOP)
    for before, after in pairwise(found.rounds):
        for name in before.masks:
            assert (after.masks[name] <= before.masks[name]).all()
            weight, mask = after.weights[f"{name}.weight"], after.masks[name]
            assert (weight[~mask] == 0).all()
            # what went was smaller than what stayed, of those that were there
            there = before.weights[f"{name}.weight"].abs()[before.masks[name]]
            assert there.numel() == before.masks[name].sum()
    pooled = [
        torch.cat([
            one.weights[f"{name}.weight"].abs()[one.masks[name] & (nxt.masks[name] == keep)]
            for name in one.masks
        ])
        for one, nxt in pairwise(found.rounds) for keep in (True, False)
    ]  # fmt: skip
    for kept, gone in zip(pooled[::2], pooled[1::2], strict=True):
        assert kept.min() >= gone.max()


def test_a_round_is_a_training_of_the_initial_weights_under_its_mask():
    model = net()
    found = iterative_magnitude(model, loss, batches(9), rounds=2, fit=LOOP)
    assert all(torch.equal(found.origin[n], t) for n, t in model.state_dict().items())
    again = masked(model, found.rounds[2].masks)
    LOOP(again, loss, batches(9))
    for name, tensor in unmasked(again).state_dict().items():
        assert torch.equal(found.rounds[2].weights[name], tensor)
    assert all(torch.equal(t, net().state_dict()[n]) for n, t in model.state_dict().items())


def test_rewinding_goes_back_to_the_dense_weights_of_that_step():
    found = iterative_magnitude(net(), loss, batches(9), rounds=1, rewind=4, fit=LOOP)
    seen = {}

    def after(model, done, rate):
        seen[done] = copy.deepcopy(model.state_dict())

    LOOP(net(), loss, batches(9), after=after)
    assert all(torch.equal(found.origin[name], t) for name, t in seen[4].items())
    assert [len(one.run.losses) for one in found.rounds] == [9, 5]
    again = masked(net(), found.rounds[1].masks)
    again.load_state_dict(masked_state(found))
    LOOP(again, loss, batches(9), start=4)
    for name, tensor in unmasked(again).state_dict().items():
        assert torch.equal(found.rounds[1].weights[name], tensor)


def test_without_rewinding_each_round_trains_the_weights_further():
    found = iterative_magnitude(net(), loss, batches(9), rounds=2, rewind=None, fit=LOOP)
    model = net()
    model.load_state_dict(found.rounds[1].weights)
    again = masked(model, found.rounds[2].masks)
    LOOP(again, loss, batches(9))
    for name, tensor in unmasked(again).state_dict().items():
        assert torch.equal(found.rounds[2].weights[name], tensor)
    assert [len(one.run.losses) for one in found.rounds] == [9, 9, 9]


def masked_state(found):
    model = net()
    model.load_state_dict(found.origin)
    return masked(model, found.rounds[1].masks).state_dict()


def test_of_equal_weights_the_first_go_and_the_count_is_exact():
    masks = {"a": torch.ones(2, 3, dtype=torch.bool), "b": torch.ones(1, 4, dtype=torch.bool)}
    weights = {name: torch.ones(mask.shape) for name, mask in masks.items()}
    first = fewer(weights, masks, rate=0.5)
    assert first["a"].tolist() == [[False] * 3, [False, False, True]]
    assert first["b"].all()
    second = fewer({n: torch.zeros_like(w) for n, w in weights.items()}, first, rate=0.2)
    assert counts(second) == [0, 4]  # zeros that are kept outlast those removed before
    assert second["a"].sum() == 0


def test_a_finished_round_is_not_trained_again(tmp_path):
    options = {"rounds": 3, "rewind": 2, "folder": tmp_path}
    trainings = []

    class Killed(Exception):
        pass

    def dying(model, inner_loss, data, **rest):
        if len(trainings) == 2:
            raise Killed
        trainings.append(1)
        return LOOP(model, inner_loss, data, **rest)

    with pytest.raises(Killed):
        iterative_magnitude(net(), loss, batches(6), fit=dying, **options)
    trainings = [1]  # one more and it would be killed again after the next
    found = iterative_magnitude(
        net(), loss, batches(6), fit=lambda *a, **k: trainings.append(1) or LOOP(*a, **k), **options
    )
    assert len(trainings) == 3
    straight = iterative_magnitude(net(), loss, batches(6), rounds=3, rewind=2, fit=LOOP)
    for one, other in zip(found.rounds, straight.rounds, strict=True):
        assert all(torch.equal(one.weights[n], t) for n, t in other.weights.items())
        assert one.run.losses == other.run.losses


@pytest.mark.parametrize("change", [{"rate": 0.3}, {"rewind": 1}, {"model": net(seed=5)}])
def test_a_folder_of_another_run_is_refused(tmp_path, change):
    options = {"model": net(), "rate": 0.2} | change
    common = {"loss": loss, "batches": batches(4), "rounds": 1, "fit": LOOP, "folder": tmp_path}
    iterative_magnitude(net(), loss, batches(4), rounds=1, fit=LOOP, folder=tmp_path)
    with pytest.raises(ValueError, match=r"round_00.pt was made by another run.*delete it"):
        iterative_magnitude(**common, **options)


def test_bad_rounds_are_refused():
    run = partial(iterative_magnitude, net(), loss, batches(4), fit=LOOP)
    with pytest.raises(ValueError, match=r"rounds=0, rate=0.2; 1 or more"):
        run(rounds=0)
    with pytest.raises(ValueError, match=r"0 < rate < 1, such as 0.2"):
        run(rounds=1, rate=1.0)
    with pytest.raises(ValueError, match="rewind=4 of 4 steps; from 0, the initialization, to 3"):
        run(rounds=1, rewind=4)
    with pytest.raises(ValueError, match=r"halved=\['1'\] are not among the pruned layers"):
        run(rounds=1, halved=["1"])
    with pytest.raises(ValueError, match="leaves none; use fewer rounds"):
        run(rounds=9, rate=0.7, pooled=False)


# --- L1 -----------------------------------------------------------------------------------------


def test_the_soft_threshold_is_the_proximal_operator_by_brute_force():
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    for w in (-2.7, -0.5, -0.1, 0.0, 0.3, 1.9):
        for t in (0.0, 0.25, 1.0):
            best = grid[((grid - w).square() / 2 + t * grid.abs()).argmin()]
            assert abs(soft_threshold(torch.tensor(w).double(), t) - best) <= 1e-4  # the spacing


def test_a_threshold_that_only_cuts_off_is_no_proximal_operator():
    w, t = torch.tensor(1.9), 1.0
    hard = w if w > t else torch.tensor(0.0)
    objective = lambda v: (v - w).square() / 2 + t * v.abs()  # noqa: E731
    assert objective(soft_threshold(w, t)) < objective(hard) - 0.4


def test_only_the_proximal_step_makes_exact_zeros():
    penalized = net()
    fit(penalized, lambda m, b: loss(m, b) + 0.05 * l1_norm(m), batches(200), rate=0.01)
    proximal = net()
    proximal_l1(proximal, loss, batches(200), strength=1.0, fit=partial(fit, rate=0.01))
    kept = [sum(counts(support(model))) for model in (penalized, proximal)]
    assert kept[0] == 151
    assert kept[1] < 100


def test_with_plain_gradient_steps_the_proximal_method_finds_the_lasso_solution():
    # 1/2 (w - c)^2 + t |w| in each coordinate: the solution is the soft threshold of c
    c, t, rate = torch.tensor([1.5, -0.4, 0.2, -3.0]), 0.5, 0.3
    w = torch.zeros(4)
    for _ in range(100):
        w = soft_threshold(w - rate * (w - c), rate * t)
    assert torch.allclose(w, soft_threshold(c, t), atol=1e-6)  # 0.7^100 and float32
    assert torch.equal(w == 0, c.abs() <= t)


def test_the_l1_norm_is_of_the_named_layers():
    model = net()
    assert l1_norm(model, ["4"]).item() == pytest.approx(model[4].weight.abs().sum().item())
    total = sum(model[i].weight.abs().sum().item() for i in (0, 2, 4))
    assert l1_norm(model).item() == pytest.approx(total)
    with pytest.raises(ValueError, match="no layer is named"):
        l1_norm(model, ["5"])


def test_bad_strengths_are_refused():
    with pytest.raises(ValueError, match=r"threshold=-1; it must be 0 or more, such as 0.01"):
        soft_threshold(torch.ones(1), -1)
    with pytest.raises(ValueError, match=r"strength=-1; it must be 0 or more, such as 0.1"):
        proximal_l1(net(), loss, batches(1), strength=-1)


# --- L0 -----------------------------------------------------------------------------------------


def gates(model, layer=0):
    return model[layer].parametrizations.weight[0]


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_the_share_of_open_gates_is_the_closed_form(log_alpha):
    model = gated(nn.Sequential(nn.Linear(400, 500)))
    with torch.no_grad():
        gates(model).log_alpha.fill_(log_alpha)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = gates(model.train()).gate()
    share = gates(model).open()[0, 0].item()
    deviation = math.sqrt(share * (1 - share) / drawn.numel())
    assert abs((drawn > 0).float().mean().item() - share) < 5 * deviation
    wrong = 1 / (1 + math.exp(-log_alpha))  # without the stretch
    assert abs((drawn > 0).float().mean().item() - wrong) > 5 * deviation
    assert drawn.min() >= 0
    assert drawn.max() <= 1


def test_a_drawn_gate_is_the_published_formula():
    model = gated(nn.Sequential(nn.Linear(3, 2))).train()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        u = torch.rand(2, 3).double().numpy()
        torch.manual_seed(3)
        drawn = gates(model).gate().detach().numpy()
    alpha = gates(model).log_alpha.detach().numpy()
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + alpha) / BETA))
    assert np.allclose(drawn, np.clip(s * (ZETA - GAMMA) + GAMMA, 0, 1), atol=1e-6)  # float32


def test_the_expected_number_has_the_gradient_of_its_differences():
    model = gated(net(), unit="column").double()
    parameter = gates(model, 2).log_alpha
    with torch.no_grad():
        parameter += torch.linspace(-1, 1, 10)

    def exact(values):  # in float64, independent of the module
        return 7 * (1 / (1 + np.exp(-(values - BETA * math.log(-GAMMA / ZETA))))).sum()

    expected_l0(model).backward()
    values = parameter.detach().double().numpy()
    for place in range(10):
        shift = np.zeros_like(values)
        shift[0, place] = 1e-5
        slope = (exact(values + shift) - exact(values - shift)) / 2e-5
        assert parameter.grad[0, place].item() == pytest.approx(slope, rel=1e-5)  # float32 inside


@pytest.mark.parametrize("unit", ["weight", "row", "column"])
def test_the_expected_number_counts_the_weights_behind_each_gate(unit):
    model = gated(net(), unit=unit)
    share = gates(model).open().flatten()[0].item()
    assert expected_l0(model).item() == pytest.approx(share * 151, rel=1e-5)
    expected = {"weight": (10, 6), "row": (10, 1), "column": (1, 6)}[unit]
    assert tuple(gates(model).log_alpha.shape) == expected


@pytest.mark.parametrize("unit", ["weight", "row", "column"])
def test_l0_training_closes_gates_and_what_is_stored_computes_the_same(unit):
    model = gated(net(), unit=unit, dropped=0.5)

    def penalized(model, batch):
        return loss(model, batch) + 0.3 * expected_l0(model) / 151

    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    task = Shuffled(x, x[:, :3].argmax(1), size=50, steps=150)  # three inputs say it all
    before = expected_l0(model).item()
    fit(model, penalized, task, rate=0.1)
    model.eval()
    stored = converted(model)
    kept = sum(stored[i].code.kept.sum().item() for i in (0, 2, 4))
    assert expected_l0(model).item() < before
    assert 0 < kept < 151
    with torch.no_grad():
        assert torch.equal(stored(x), model(x))
    drawn = converted(model.train())  # the stored gates are the test-time ones in either mode
    assert gates(model).training
    with torch.no_grad():
        assert torch.equal(drawn.eval()(x), stored(x))


def test_the_test_time_gate_is_the_published_formula():
    model = gated(net(), dropped=0.3).eval()
    sigmoid = 1 / (1 + math.exp(-math.log(0.7 / 0.3)))
    expected = min(1, max(0, sigmoid * (ZETA - GAMMA) + GAMMA))
    assert gates(model).gate()[0, 0].item() == pytest.approx(expected, rel=1e-6)


def test_gates_of_no_unit_and_of_no_layer_are_refused():
    with pytest.raises(ValueError, match="it must be one of 'weight', 'row', 'column'"):
        gated(net(), unit="head")
    with pytest.raises(ValueError, match=r"dropped=1; it must be between 0 and 1, such as 0.1"):
        gated(net(), dropped=1)
    with pytest.raises(ValueError, match="no layer is named"):
        gated(net(), ["1"])
    with pytest.raises(ValueError, match="give one that `gated` returned"):
        expected_l0(net())
