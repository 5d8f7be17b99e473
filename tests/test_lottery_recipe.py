"""The arms of the lottery experiment differ in what their names say, and in nothing else."""

import pytest
import torch

from compresskit.recipes import lottery

MASKS = {"linear1": torch.rand(6, 50, generator=torch.Generator().manual_seed(0)) < 0.3}


@pytest.fixture(scope="module")
def short():
    """The digits with trainings of 20 updates."""
    patch = pytest.MonkeyPatch()
    patch.setitem(lottery.TASKS, "digits_mlp", (lottery.TASKS["digits_mlp"][0], 20))
    lottery.iterated.cache_clear()
    yield "digits_mlp"
    patch.undo()
    lottery.iterated.cache_clear()


def test_a_drawn_mask_keeps_as_many_weights_elsewhere():
    drawn = lottery.drawn(MASKS, 1)
    assert lottery.kept(drawn) == lottery.kept(MASKS)
    assert not torch.equal(drawn["linear1"], MASKS["linear1"])
    assert torch.equal(drawn["linear1"], lottery.drawn(MASKS, 1)["linear1"])


def test_a_mask_at_once_keeps_as_many_and_the_largest():
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    found = lottery.at_once({"linear1.weight": weight}, MASKS)["linear1"]
    assert lottery.kept({"": found}) == lottery.kept(MASKS)
    assert weight.abs()[found].min() > weight.abs()[~found].max()


def test_signs_are_those_of_one_and_sizes_those_of_the_other():
    one, other = (lottery.fresh("digits_mlp", seed).state_dict() for seed in (0, 1))
    mixed = lottery.with_signs(one, other, {"linear1": None})
    assert torch.equal(mixed["linear1.weight"].sign(), other["linear1.weight"].sign())
    assert torch.equal(mixed["linear1.weight"].abs(), one["linear1.weight"].abs())
    assert torch.equal(mixed["linear1.bias"], one["linear1.bias"])
    assert torch.equal(mixed["head.weight"], one["head.weight"])


@pytest.mark.parametrize("arm", lottery.ARMS)
def test_every_arm_of_a_level_keeps_as_many_weights_in_every_layer(short, arm):
    record = lottery.by_level(build=short, seed=0, arm=arm, levels=[0, 1, 3])
    assert record["kept"] == [[8192, 8192, 640], [6554, 6554, 576], [4194, 4194, 466]]
    assert all(0 < accuracy <= 1 for accuracy in record["accuracy"])


def test_the_ticket_starts_at_the_first_weights_and_the_rewound_one_a_little_later(short):
    ticket, rewound = (lottery.iterated(short, 0, arm, rounds=1) for arm in ("ticket", "rewound"))
    first = lottery.fresh(short, 0).state_dict()
    assert all(torch.equal(ticket.origin[name], first[name]) for name in first)
    assert not torch.equal(rewound.origin["linear1.weight"], first["linear1.weight"])
    dense = (found.rounds[0].weights["linear1.weight"] for found in (ticket, rewound))
    assert torch.equal(*dense)
    assert [len(found.rounds[1].run.losses) for found in (ticket, rewound)] == [20, 19]


def test_a_training_of_the_tickets_mask_and_first_weights_gives_the_ticket(short):
    found = lottery.iterated(short, 0, "ticket", rounds=2)
    again = lottery.retrained(short, found.origin, found.rounds[2].masks, order=0)
    assert all(torch.equal(again[name], t) for name, t in found.rounds[2].weights.items())


def test_one_shot_as_long_has_the_updates_of_all_rounds(short, monkeypatch):
    seen = []
    usual = lottery.retrained

    def watched(*args, **options):
        seen.append((args[1], options["steps"]))
        return usual(*args, **options)

    monkeypatch.setattr(lottery, "retrained", watched)
    lottery.by_level(build=short, seed=0, arm="one-shot, as long", levels=[3])
    dense = lottery.iterated(short, 0, "ticket", rounds=3).rounds[0].weights
    (start, steps), *others = seen
    assert steps == 3 * 20
    assert not others
    assert all(torch.equal(start[name], dense[name]) for name in dense)


def test_there_is_no_barrier_between_equal_weights(short):
    state = lottery.fresh(short, 0).state_dict()
    assert lottery.barrier(short, state, state) == pytest.approx(0, abs=1e-12)


def test_a_barrier_is_a_fall_below_the_line_between_the_ends(monkeypatch):
    levels = {0.0: 0.9, 0.5: 0.2, 1.0: 0.7}
    monkeypatch.setattr(lottery, "score", lambda build, state: levels[state["t"].item()])
    ends = {"t": torch.tensor(0.0)}, {"t": torch.tensor(1.0)}
    assert lottery.barrier("", *ends, points=3) == pytest.approx(0.6)  # 0.8 - 0.2


def test_an_unknown_arm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'winner'; known are 'ticket'"):
        lottery.by_level(build="digits_mlp", seed=0, arm="winner")
