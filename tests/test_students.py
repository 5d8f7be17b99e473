"""The experiments on small students: what they compare differs in one thing, and in that one."""

from functools import partial

import pytest
import torch

from compresskit import data
from compresskit.models import decoder
from compresskit.recipes import distillation, language_student
from compresskit.recipes.recipe import Recipe, initialized
from compresskit.train import IGNORED, Shuffled, cached_logits

accuracy = partial(distillation.student_accuracy, count=50, seed=0, steps=20)


def test_small_draws_are_the_first_of_large_ones_and_seeds_differ():
    large = distillation.drawn(4_000, seed=3)
    assert torch.equal(distillation.drawn(50, seed=3), large[:50])
    assert sorted(large.tolist()) == list(range(4_000))
    assert not torch.equal(distillation.drawn(50, seed=4), large[:50])


def test_first_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    one, two, other = (distillation.fresh("mnist1d_mlp", seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_an_experiment_repeats_itself_and_changes_with_its_seed():
    found = [accuracy(way="soft"), accuracy(way="soft")]
    assert found[0] == found[1]
    others = {accuracy(way="soft", seed=seed) for seed in range(1, 4)}
    assert others != {found[0]}


@pytest.mark.slow
def test_without_soft_labels_every_way_is_the_first():
    plain = accuracy(way="hard")
    # other roundings on the way to the same loss: a few of 1,000 answers may differ
    assert accuracy(way="soft", alpha=0.0) == pytest.approx(plain, abs=0.01)


@pytest.mark.slow
def test_a_teacher_of_few_examples_has_seen_only_those():
    samples = data.mnist1d()
    model = distillation.teacher(30, 0, steps=150)
    with torch.no_grad():
        right = model(samples.train_x).argmax(1) == samples.train_y
    seen = distillation.drawn(30, 0)
    unseen = torch.ones(4_000, dtype=torch.bool)
    unseen[seen] = False
    assert right[seen].float().mean() > 0.9
    assert right[unseen].float().mean() < 0.6


def answers():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(200, 10, generator=generator), torch.arange(200) % 10


@pytest.mark.parametrize("disguise", distillation.DISGUISES)
def test_a_disguise_removes_what_it_says(disguise):
    logits, labels = answers()
    out = distillation.disguise_answers(logits, labels, disguise, 0)
    means = torch.stack([logits[labels == c].mean(0) for c in range(10)])
    own = means.diagonal()
    if disguise == "none":
        assert torch.equal(out, logits)
    elif disguise == "shuffled":
        assert not torch.equal(out, logits)
        assert torch.equal(out.sort(0).values, logits.sort(0).values)
    else:  # nothing is said about the example beside its label
        table = torch.stack([out[labels == c][0] for c in range(10)])
        assert torch.equal(out, table[labels])
        assert torch.allclose(table.diagonal(), own)
        assert torch.allclose(table.sum(1), means.sum(1), atol=1e-5)
        assert torch.allclose(table, means) == (disguise == "class")
        off = table[~torch.eye(10, dtype=torch.bool)].view(10, 9)
        assert (off.std(1) < 1e-6).all() == (disguise == "flat")
        kept = means[~torch.eye(10, dtype=torch.bool)].view(10, 9)
        same = torch.allclose(off.sort(1).values, kept.sort(1).values)
        assert same == (disguise != "flat")


def test_an_undisguised_teacher_is_the_soft_way():
    found = distillation.disguised_accuracy(disguise="none", count=50, seed=0, steps=20)
    assert found == accuracy(way="soft")


def test_a_shuffled_teacher_teaches_nothing():
    found = distillation.disguised_accuracy(disguise="shuffled", count=1_000, seed=0, steps=100)
    assert found < 0.25  # of ten classes; the labels have a weight of 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracy(way="warm"), "way='warm'; the ways are 'hard', 'smoothed', 'soft'"),
        (
            lambda: distillation.disguise_answers(*answers(), "hat", 0),
            "disguise='hat'; known are 'none'",
        ),
        (lambda: language_student.quarter_student(way="x", seed=0), "way='x'; the ways are 'hard'"),
        (
            lambda: language_student.half_student(losses="four", seed=0),
            "losses='four'; known are 'three losses'",
        ),
    ],
)
def test_unknown_names_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- students of the byte model --------------------------------------------------------------


def test_the_label_of_a_position_is_the_byte_after_it():
    inputs, labels = language_student.windows(torch.arange(100), 8, 4)
    assert torch.equal(labels, inputs + 1)
    assert inputs[:, 0].tolist() == list(range(0, 92, 4))


def test_real_text_is_the_training_split_and_all_of_it():
    inputs, labels = language_student.real_text()
    ids = data.text(data.pydoc().train)
    assert torch.equal(inputs[0], ids[:256])
    seen = 128 * (len(inputs) - 1) + 256
    assert torch.equal(labels[-1], ids[seen - 255 : seen + 1])
    assert len(ids) - seen <= 128


@pytest.mark.slow
def test_samples_start_with_real_text_that_is_not_learned():
    inputs, labels = language_student.teacher_samples(3, seed=1)
    text = bytes(data.text(data.pydoc().train).tolist())
    assert inputs.shape == labels.shape == (3, 255)
    for row, label in zip(inputs, labels, strict=True):
        assert bytes(row[:32].tolist()) in text
        assert (label[:31] == IGNORED).all()
        assert torch.equal(label[31:-1], row[32:])
        assert 0 <= label[-1] < 256
    again, _ = language_student.teacher_samples.__wrapped__(3, seed=1)
    assert torch.equal(inputs, again)


def test_the_quarter_size_student_has_a_quarter_of_the_parameters():
    student = decoder.Decoder(language_student.SMALL)
    teacher = language_student.teacher()
    small, large = (sum(p.numel() for p in m.parameters()) for m in (student, teacher))
    assert small / large == pytest.approx(0.25, abs=0.01)


@pytest.fixture
def short(monkeypatch):
    """Seven windows of text, two of the teacher's, and the trained student instead of its score."""
    text = language_student.windows(data.text(data.pydoc().train)[: 7 * 256 + 1], 256, 256)
    own = language_student.teacher_samples.__wrapped__(2, seed=0)
    seen = {"real": text, "samples": own}
    monkeypatch.setattr(language_student, "real_text", lambda: text)
    monkeypatch.setattr(language_student, "teacher_samples", lambda: own)
    monkeypatch.setattr(
        language_student,
        "answers",
        lambda name: cached_logits(language_student.teacher(), seen[name][0]),
    )
    monkeypatch.setattr(language_student, "scores", lambda model: model)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("way", language_student.WAYS)
def test_a_way_trains_on_its_text_and_its_kind_of_label(short, way):
    """The first update against one written out: the same weights, batch and gradient."""
    student = language_student.quarter_student(way=way, seed=1, steps=1)
    inputs, labels = short["real" if way in ("hard", "token-level") else "samples"]
    by_hand = initialized(Recipe(language_student.SMALL, seed=1))
    x, y, theirs = Shuffled(
        inputs, labels, language_student.teacher()(inputs).detach(), size=8, steps=1, seed=1
    )[0]
    counted = y != IGNORED
    mine = by_hand(x)[counted].log_softmax(-1)
    if way.startswith("token-level"):
        p = theirs[counted].softmax(-1)
        loss = (p * (p.log() - mine)).sum(-1).mean()
    else:
        loss = -mine.gather(-1, y[counted][:, None]).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
    torch.optim.AdamW(by_hand.parameters(), lr=3e-3, weight_decay=0.0).step()
    for ours, theirs in zip(student.parameters(), by_hand.parameters(), strict=True):
        # the first step of Adam is about rate * sign: a gradient near 0 may round to either side
        assert ((ours - theirs).abs() > 1e-5).double().mean() < 0.01


@pytest.mark.slow
def test_the_half_size_student_starts_as_every_second_block(short):
    start = language_student.half_student(losses="three losses", seed=0, steps=0)
    teacher = language_student.teacher()
    for place, block in enumerate(start.blocks):
        assert torch.equal(block.attn.q.weight, teacher.blocks[2 * place].attn.q.weight)
    trained = language_student.half_student(losses="hard labels only", seed=0, steps=1)
    fresh = language_student.half_student(losses="hard labels only", seed=0, steps=1, fresh=True)
    moved = [(m.embed.weight - start.embed.weight).abs().max() for m in (trained, fresh)]
    assert 0 < moved[0] < 2e-3 < moved[1]  # one step of Adam at 1e-3, and other first weights
