"""The students of the sentence encoder: what they see, what they start from, what they forget."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from compresskit.models import EncoderConfig, SentenceEncoder
from compresskit.recipes import sentence_student as ss

FIRST, LAST = 1, 2  # the ids of [CLS] and [SEP]
TEXTS = [" ".join(str(10 + (i * 7 + j) % 80) for j in range(12 + 5 * i)) for i in range(12)]


class Words:
    """A tokenizer of numbers: each is its own id."""

    def encode_batch(self, texts):
        return [SimpleNamespace(ids=[FIRST, *map(int, t.split()), LAST]) for t in texts]


@pytest.fixture(scope="module")
def teacher():
    config = EncoderConfig(vocab=100, positions=128, width=16, layers=6, heads=2, hidden=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SentenceEncoder(config, Words()).eval()


@pytest.fixture(scope="module")
def lessons(teacher):
    groups = ss.pieces(teacher, TEXTS, each=3)
    return groups, ss.answers(teacher, groups)


RECIPE = ss.Recipe(steps=30, tokens=64, rate=3e-3, warmup=2)


def test_pieces_are_parts_of_texts_and_need_no_padding(teacher, lessons):
    groups, _ = lessons
    whole = [code.ids[1:-1] for code in teacher.tokenizer.encode_batch(TEXTS)]
    strings = [" " + " ".join(map(str, ids)) + " " for ids in whole]
    assert groups
    assert len({ids.shape[1] for ids in groups}) == len(groups)
    for ids in groups:
        assert ids.shape[1] % ss.MULTIPLE == 0
        assert ids.shape[1] >= ss.LEAST
        for piece in ids.tolist():
            assert piece[0] == FIRST
            assert piece[-1] == LAST
            inner = " " + " ".join(map(str, piece[1:-1])) + " "
            assert any(inner in string for string in strings)


def test_pieces_depend_on_the_seed_alone_and_short_texts_give_none(teacher):
    first, again, other = (ss.pieces(teacher, TEXTS, each=3, seed=s) for s in (0, 0, 1))
    assert all(map(torch.equal, first, again))
    assert [g.tolist() for g in first] != [g.tolist() for g in other]
    assert ss.pieces(teacher, ["10 11 12"], each=3) == []


def test_each_answer_is_the_teachers_to_that_piece(teacher, lessons):
    for ids, target in zip(*lessons, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(target[0], teacher(ids[:1])[0])
        assert len(ids) == len(target)


def test_a_batch_holds_pieces_of_one_length_with_their_own_answers(lessons):
    groups, targets = lessons
    pairs = {
        tuple(piece): answer
        for ids, target in zip(groups, targets, strict=True)
        for piece, answer in zip(ids.tolist(), target, strict=True)
    }
    batches = ss.Batches(groups, targets, tokens=64, steps=40, seed=3)
    assert len(batches) == 40
    for ids, target in batches:
        assert ids.numel() <= max(64, ids.shape[1])
        for piece, answer in zip(ids.tolist(), target, strict=True):
            assert torch.equal(pairs[tuple(piece)], answer)


def test_a_batch_depends_on_its_number_and_the_seed_alone(lessons):
    one, two = (ss.Batches(*lessons, tokens=64, steps=40, seed=3) for _ in range(2))
    other = ss.Batches(*lessons, tokens=64, steps=40, seed=4)
    assert torch.equal(two[39][0], one[39][0])  # asked for out of order
    assert torch.equal(two[0][0], one[0][0])
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(one, other, strict=True))
    with pytest.raises(IndexError, match="step 40 of 40"):
        one[40]


def test_batches_that_no_length_can_fill_are_refused(lessons):
    with pytest.raises(ValueError, match=r"no length has .* tokens"):
        ss.Batches(*lessons, tokens=100_000, steps=1, seed=0)


def test_a_student_starts_from_the_named_layers_or_from_random_ones(teacher):
    kept = ss.initialized(teacher, [1, 3, 5])
    for place, layer in zip([1, 3, 5], kept.encoder["layer"], strict=True):
        theirs = teacher.encoder["layer"][place].state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in layer.state_dict().items())
    fresh, again = (ss.initialized(teacher, [1, 3, 5], start="random", seed=1) for _ in range(2))
    weight = "0.intermediate.dense.weight"
    mine, same = (s.encoder["layer"].state_dict()[weight] for s in (fresh, again))
    assert torch.equal(mine, same)
    assert mine.std().item() == pytest.approx(0.02, rel=0.2)  # 512 draws
    assert not torch.equal(mine, kept.encoder["layer"].state_dict()[weight])
    with pytest.raises(ValueError, match="start='zeros'"):
        ss.initialized(teacher, [0], start="zeros")


@pytest.mark.parametrize("way", ss.WAYS)
def test_training_changes_the_students_layers_and_nothing_else(teacher, lessons, way):
    before = copy.deepcopy(teacher.state_dict())
    recipe = ss.Recipe(steps=2, tokens=64, rate=3e-3)
    student, run = ss.train_student(teacher, *lessons, way=way, recipe=recipe, seed=0)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    embeddings = student.embeddings.state_dict()
    assert all(torch.equal(v, before[f"embeddings.{k}"]) for k, v in embeddings.items())
    assert len(run.losses) == 2
    assert len(student.encoder["layer"]) == 3


def cosine(teacher, student):
    return F.cosine_similarity(teacher.encode(TEXTS), student.encode(TEXTS)).mean().item()


def test_a_distilled_student_is_nearer_than_one_dropped_or_taught_by_shuffled_answers(
    teacher, lessons
):
    dropped = cosine(teacher, ss.initialized(teacher, RECIPE.places))
    found = {
        way: cosine(teacher, ss.train_student(teacher, *lessons, way=way, recipe=RECIPE)[0])
        for way in ("distilled", "shuffled teacher")
    }
    assert found["distilled"] > dropped
    assert found["distilled"] > found["shuffled teacher"]


def test_the_same_seed_gives_the_same_student(teacher, lessons):
    recipe = ss.Recipe(steps=3, tokens=64)
    for way in ("from scratch", "without teacher"):
        one, two = (
            ss.train_student(teacher, *lessons, way=way, recipe=recipe, seed=5)[0] for _ in range(2)
        )
        assert all(map(torch.equal, one.state_dict().values(), two.state_dict().values()))


def test_shuffled_answers_are_the_same_answers_elsewhere(lessons):
    _, targets = lessons
    moved = ss._shuffled(targets, seed=0)
    assert [len(t) for t in moved] == [len(t) for t in targets]
    old, new = torch.cat(targets), torch.cat(moved)
    assert not torch.equal(old, new)
    assert torch.equal(old.sum(1).sort().values, new.sum(1).sort().values)


def test_the_crop_loss_is_small_only_if_crops_of_one_text_are_embedded_alike():
    ids = torch.cat([torch.full((8, 1), FIRST), torch.arange(8)[:, None].expand(8, 14) + 10], 1)
    ids = torch.cat([ids, torch.full((8, 1), LAST)], 1)

    def by_word(crop):  # every text is one word, repeated
        return F.one_hot(crop[:, 1] - 10, 8).float()

    assert ss.crop_loss(by_word, (ids, None)).item() < 1e-3
    blind = ss.crop_loss(lambda crop: torch.ones(len(crop), 4) / 2, (ids, None))
    assert blind.item() == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-5)


def test_a_bag_of_words_recovers_answers_that_are_linear_in_the_mean_word(teacher, lessons):
    groups, _ = lessons
    words = teacher.embeddings.word_embeddings.weight.detach()
    mix = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    answers = [words[ids].mean(1) @ mix for ids in groups]
    codes = teacher.tokenizer.encode_batch(TEXTS)
    expected = torch.stack([words[torch.tensor(code.ids)].mean(0) @ mix for code in codes])
    found = ss.bag_of_words(teacher, groups, answers, TEXTS, ridge=1e-10)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)  # float32 answers


def test_the_stored_run_names_every_way_and_differs_in_one_thing_at_a_time():
    settings = [s for s, _ in ss.tasks()]
    assert {s["way"] for s in settings} == {"dropped", "bag of words", *ss.WAYS}
    assert all(a != b for i, a in enumerate(settings) for b in settings[:i])
    for way in ("distilled", "from scratch"):
        mine = [s for s in settings if s["way"] == way and s["places"] == [1, 3, 5]]
        assert [s["seed"] for s in mine if s["rate"] == ss.RATE] == [0, 1, 2]


def test_an_unknown_way_is_refused(teacher, lessons):
    with pytest.raises(ValueError, match="way='osmosis'; the ways are 'distilled'"):
        ss.train_student(teacher, *lessons, way="osmosis")


def test_scores_carry_their_standard_errors():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 8, generator=generator)
    b = a + 0.5 * torch.randn(50, 8, generator=generator)
    found = ss.score(a, b)
    cosines = F.cosine_similarity(a, b)
    assert found["cosine"] == pytest.approx(cosines.mean().item(), rel=1e-5)
    assert found["cosine_error"] == pytest.approx((cosines.std() / 50**0.5).item(), rel=1e-5)
    assert ss.score(a, a)["top1"] == 1
    assert ss.score(a, a)["top1_error"] == 0
