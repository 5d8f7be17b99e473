"""The training loop, and the ways of distillation built on it."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compresskit import losses, train
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.surgery import keep_layers
from compresskit.train import Shuffled, cached_logits, distill, distill_mutual, distill_triple, fit

SHAPE = DecoderConfig(vocab=16, width=16, layers=4, heads=2, kv_heads=1, hidden=24, context=8)


def network(seed=0, width=8, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(4, width), nn.Dropout(dropout), nn.ReLU(), nn.Linear(width, 3)
        )


def decoder(seed=0, config=SHAPE):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Decoder(config)


@pytest.fixture
def task():
    """64 points of a linear problem in three classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4, generator=generator)
    return x, (x @ torch.randn(4, 3, generator=generator)).argmax(1)


@pytest.fixture
def text():
    """12 windows of a text in which each token follows from the one before."""
    ids = (torch.arange(9) * 3 + torch.arange(12)[:, None]) % 16
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(x, y, *, seed=0, steps=30, dropout=0.2, **options):
    model = network(dropout=dropout)
    fit(model, cross_entropy, Shuffled(x, y, size=16, steps=steps, seed=seed), seed=seed, **options)
    return model


# --- batches -----------------------------------------------------------------------------------


def test_an_epoch_shows_each_row_once_and_the_next_in_another_order():
    rows = Shuffled(torch.arange(12), size=4, steps=6)
    first, second = (torch.cat([rows[t][0] for t in part]) for part in (range(3), range(3, 6)))
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(12))
    assert not torch.equal(first, second)


def test_a_batch_depends_on_seed_and_step_alone():
    tensors = torch.arange(10), torch.arange(10) * 2
    one, two = (Shuffled(*tensors, size=3, steps=9, seed=5) for _ in range(2))
    backwards = [two[t] for t in reversed(range(9))][::-1]
    for step, (left, right) in enumerate(backwards):
        assert torch.equal(one[step][0], left)
        assert torch.equal(right, 2 * left)  # rows of all tensors stay together
    assert not torch.equal(one[0][0], Shuffled(*tensors, size=3, steps=9, seed=6)[0][0])


def test_a_batch_larger_than_the_data_is_the_data():
    assert len(Shuffled(torch.arange(5), size=100, steps=2)[1][0]) == 5


def test_batches_end():
    assert len(list(Shuffled(torch.arange(5), size=2, steps=7))) == 7


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ((), {}, r"tensors of \[\] rows"),
        ((torch.ones(3), torch.ones(2)), {}, r"tensors of \[3, 2\] rows; give tensors of equal"),
        ((torch.ones(0),), {}, r"tensors of \[0\] rows"),
        ((torch.ones(3),), {"size": 0}, "size=0, steps=1; both must be 1 or more, such as 100"),
        ((torch.ones(3),), {"steps": 0}, "steps=0"),
    ],
)
def test_impossible_batches_are_refused(tensors, options, message):
    with pytest.raises(ValueError, match=message):
        Shuffled(*tensors, **({"size": 1, "steps": 1} | options))


# --- the loop ----------------------------------------------------------------------------------


def test_one_step_is_pytorch_s_own_step(task):
    ours, theirs = network(), network()
    fit(ours, cross_entropy, [task], rate=0.1, decay=0.2, clip=None)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.2)
    cross_entropy(theirs, task).backward()
    optimizer.step()
    assert torch.equal(weights(ours), weights(theirs))


def test_the_rate_rises_in_a_line_and_falls_as_half_a_cosine(task):
    seen = []

    class Spy(torch.optim.AdamW):
        def step(self):
            seen.append([group["lr"] for group in self.param_groups])
            super().step()

    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[3].parameters(), "lr": 0.5}]
    batches = [task] * 8
    fit(model, cross_entropy, batches, rate=1.0, warmup=2, parameters=groups, optimizer=Spy)
    expected = [min(1, (t + 1) / 2) * (1 + math.cos(math.pi * t / 8)) / 2 for t in range(8)]
    assert [first for first, _ in seen] == pytest.approx(expected)
    assert [second for _, second in seen] == pytest.approx([rate / 2 for rate in expected])


def test_training_lowers_the_loss_and_returns_every_one(task):
    model = network()
    batches = Shuffled(*task, size=16, steps=200)
    done = fit(model, cross_entropy, batches, rate=3e-2)
    assert len(done.losses) == 200
    assert sum(done.losses[-8:]) < 0.5 * sum(done.losses[:8])


def test_equal_seeds_give_equal_weights_and_other_seeds_others(task):
    one, two, other = (weights(run(*task, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_training_leaves_the_global_random_state_and_the_mode_alone(task):
    before = torch.get_rng_state()
    for mode in (True, False):
        model = network(dropout=0.5).train(mode)
        model[3].train(not mode)
        fit(model, cross_entropy, [task], rate=0.1)
        assert (model.training, model[3].training) == (mode, not mode)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_drawn_anew_in_each_step_and_only_while_training(task):
    def differing(mode):
        seen = []
        model = network(dropout=0.5)

        def watched(model, batch):
            seen.append(model(batch[0]).detach())
            return cross_entropy(model, batch)

        fit(model.train(mode), watched, [task] * 2, rate=1e-9)
        return not torch.allclose(seen[0], seen[1], atol=1e-4)

    assert differing(True)
    assert differing(False)  # training mode is the loop's, whatever the model was in


def test_gradients_are_clipped_to_the_norm_that_is_asked_for(task):
    def steep(model, batch):
        return 1e3 * cross_entropy(model, batch)

    norms = {}
    for clip in (1.0, None):
        model = network()
        fit(model, steep, [task], rate=0.0, clip=clip)
        norms[clip] = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[1.0] == pytest.approx(1, rel=1e-4)
    assert norms[None] > 100


def test_only_what_is_named_is_updated(task):
    model = network()
    before = weights(model[0])
    fit(model, cross_entropy, [task] * 3, rate=0.1, parameters=model[3].parameters())
    assert torch.equal(weights(model[0]), before)
    model[0].requires_grad_(False)
    fit(model, cross_entropy, [task] * 3, rate=0.1)
    assert torch.equal(weights(model[0]), before)


def test_the_best_weights_by_evaluation_are_kept(task):
    model = network()
    kept, values = [], iter([3.0, 1.0, 2.0])

    def evaluate(model):
        assert not model.training
        kept.append(weights(model))
        return {"value": next(values), "other": 0.0}

    batches = Shuffled(*task, size=16, steps=9)
    done = fit(model, cross_entropy, batches, rate=0.1, evaluate=evaluate, every=3)
    assert [entry["value"] for entry in done.curve] == [3.0, 1.0, 2.0]
    assert [entry["step"] for entry in done.curve] == [3, 6, 9]
    assert torch.equal(weights(model), kept[1])


class Killed(Exception):
    pass


def dying(at):
    """A loss that kills the process, so to speak, when it is asked for the `at`-th time."""
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return cross_entropy(model, batch)

    return loss


@pytest.mark.parametrize("at", [1, 7, 11, 12, 20])
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_end(task, tmp_path, at):
    def go(loss, name, model):
        rows = Shuffled(*task, size=16, steps=20, seed=3)

        def score(model):
            return {"loss": cross_entropy(model, task).item()}

        file = tmp_path / name
        return fit(
            model, loss, rows, rate=0.05, every=5, checkpoint=file, evaluate=score, seed=3
        )  # fmt: skip

    whole = network(dropout=0.3)
    done = go(cross_entropy, "whole", whole)
    parts = network(dropout=0.3)
    with pytest.raises(Killed):
        go(dying(at), "parts", parts)
    parts = network(seed=9, dropout=0.3)  # what the model held is in the checkpoint
    if at <= 5:
        parts = network(dropout=0.3)  # there is no checkpoint yet
    again = go(cross_entropy, "parts", parts)
    assert torch.equal(weights(whole), weights(parts))
    assert again == done
    assert go(dying(1), "parts", network(seed=4)) == done  # finished: no step is left
    assert not list(tmp_path.glob("*.tmp"))


def test_a_kill_while_the_checkpoint_is_written_leaves_the_last_one(task, tmp_path, monkeypatch):
    file = tmp_path / "c"
    fit(network(), cross_entropy, [task] * 4, checkpoint=file, every=4)
    before = file.read_bytes()
    save = torch.save

    def torn(state, opened):
        save(state, opened)
        opened.truncate(100)
        raise Killed

    monkeypatch.setattr(torch, "save", torn)
    file.unlink()
    file.write_bytes(before)
    with pytest.raises(ValueError, match="was made by another run: steps differ"):
        fit(network(), cross_entropy, [task] * 5, checkpoint=file, every=4)
    with pytest.raises(Killed):
        fit(network(), cross_entropy, [task] * 4, checkpoint=tmp_path / "d", every=2)
    assert not (tmp_path / "d").exists()
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        {"rate": 0.5},
        {"seed": 1},
        {"warmup": 3},
        {"decay": 0.1},
        {"clip": 2.0},
        {"recipe": {"data": 2}},
    ],
)
def test_the_checkpoint_of_another_run_is_refused(task, tmp_path, change):
    file = tmp_path / "c"
    fit(network(), cross_entropy, [task] * 2, checkpoint=file, every=2)
    with pytest.raises(ValueError, match=r"made by another run: .*differ; delete it to"):
        fit(network(), cross_entropy, [task] * 2, checkpoint=file, every=2, **change)
    with pytest.raises(ValueError, match="shapes differ"):
        fit(network(width=9), cross_entropy, [task] * 2, checkpoint=file, every=2)


def test_a_recipe_that_could_not_be_read_again_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=r"recipe: .* may hold numbers, text and lists of them"):
        fit(network(), cross_entropy, [task], recipe={"where": tmp_path})


def test_a_checkpoint_at_the_end_only_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match=r"saves nothing from a kill; .* for instance every=3"):
        fit(network(), cross_entropy, [task] * 30, checkpoint=tmp_path / "c")


def test_a_checkpoint_that_may_not_be_read_is_not_called_corrupt(task, tmp_path, monkeypatch):
    (tmp_path / "c").write_bytes(b"x")

    def refuse(*arguments, **options):
        raise PermissionError("not yours")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(PermissionError):
        fit(network(), cross_entropy, [task], checkpoint=tmp_path / "c", every=1)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04"])
def test_a_file_that_is_no_checkpoint_is_refused(task, tmp_path, content):
    file = tmp_path / "c"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="is no checkpoint of `fit`; delete it"):
        fit(network(), cross_entropy, [task], checkpoint=file, every=1)
    assert file.read_bytes() == content


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_its_update(task, bad):
    model, reference = network(), network()

    def loss(model, batch):
        loss.calls += 1
        return cross_entropy(model, batch) * (bad if loss.calls == 3 else 1)

    loss.calls = 0
    with pytest.raises(
        FloatingPointError, match=rf"the loss is {bad} at step 3; .* rate below 0.1"
    ):
        fit(model, loss, [task] * 8, rate=0.1)
    loss.calls = 100
    with pytest.raises(IndexError):  # the same first two steps of eight, by the same schedule
        fit(reference, loss, Short([task] * 2, 8), rate=0.1)
    assert torch.equal(weights(model), weights(reference))


class Short(list):
    def __init__(self, items, length):
        super().__init__(items)
        self.length = length

    def __len__(self):
        return self.length


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_update(task):
    model = network()
    before = weights(model)

    def loss(model, batch):  # finite, with an infinite slope at 0
        return (0 * model(batch[0]).sum()).abs().sqrt()

    with pytest.raises(FloatingPointError, match="the gradient's norm is nan at step 1"):
        fit(model, loss, [task])
    assert torch.equal(weights(model), before)


def test_an_evaluation_that_is_no_number_stops_the_run(task):
    with pytest.raises(FloatingPointError, match="`evaluate` gave bits = nan after 1 steps"):
        fit(network(), cross_entropy, [task], evaluate=lambda model: {"bits": math.nan})


@pytest.mark.parametrize(("batches", "every"), [([], None), ([0], 0)])
def test_a_run_of_nothing_is_refused(batches, every):
    with pytest.raises(ValueError, match=r"one batch or more, and every >= 1"):
        fit(network(), cross_entropy, batches, every=every)


@pytest.mark.parametrize("progress", [False, True])
def test_the_bar_is_shown_only_when_asked_for(task, progress, capsys):
    fit(network(), cross_entropy, [task] * 3, progress=progress)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert ("3/3" in shown.err) == progress


# --- cached answers ------------------------------------------------------------------------------


def test_cached_answers_are_the_teacher_s_in_evaluation_mode(task):
    teacher = network(dropout=0.5).train()
    cached = cached_logits(teacher, task[0], batch=7)
    assert teacher.training
    assert torch.allclose(cached, teacher.eval()(task[0]), atol=1e-6)  # other batches, other sums
    assert not cached.requires_grad


def test_an_ensemble_answers_with_its_mean_probability(task):
    teachers = [network(seed) for seed in range(3)]
    mixed = cached_logits(teachers, task[0]).softmax(-1)
    mean = torch.stack([teacher(task[0]).softmax(-1) for teacher in teachers]).mean(0)
    assert torch.allclose(mixed.float(), mean, atol=1e-6)


def test_an_ensemble_may_be_a_list_of_modules(task):
    teachers = [network(seed) for seed in range(2)]
    one, two = (cached_logits(kind, task[0]) for kind in (teachers, nn.ModuleList(teachers)))
    assert torch.equal(one, two)


def test_no_teacher_is_refused(task):
    with pytest.raises(ValueError, match="no teacher; give a model, or a list"):
        cached_logits([], task[0])


@pytest.mark.parametrize("shape", ["classes", "sequences"])
def test_kept_classes_are_those_of_the_whole_answer(task, text, shape):
    model, x = (network(), task[0]) if shape == "classes" else (decoder(), text[0])
    kept = cached_logits(model, x, batch=5, top=2, temperature=3.0)
    whole = losses.topk_targets(model(x).detach(), 2, temperature=3.0)
    assert torch.equal(kept.indices, whole.indices)
    assert torch.allclose(kept.log_probs.float(), whole.log_probs.float(), atol=1e-5)


# --- distillation --------------------------------------------------------------------------------


def test_offline_is_online_with_the_teacher_s_answers_looked_up(task):
    teacher, offline, online = network(5), network(1), network(1)
    x, y = task
    distill(offline, teacher, x, y, steps=20, batch=16, temperature=2.0, alpha=0.7, rate=0.05)

    def loss(model, batch):
        target = teacher(batch[0])
        return losses.distillation_loss(
            model(batch[0]), target, batch[1], temperature=2.0, alpha=0.7
        )

    fit(online, loss, Shuffled(x, y, size=16, steps=20), rate=0.05)
    assert torch.allclose(weights(offline), weights(online), atol=1e-4)


def test_a_student_of_the_teacher_alone_comes_to_agree_with_it(task):
    teacher, student, stranger = network(5), network(1), network(1)
    x = task[0]
    wrong = (teacher(x).argmax(1) + 1) % 3  # labels that alpha = 1 must not look at
    distill(student, teacher, x, wrong, steps=300, batch=32, alpha=1.0, rate=0.05)
    apart = [losses.forward_kl(m(x), teacher(x)).item() for m in (student, stranger)]
    assert apart[0] < 0.05 * apart[1]


def test_without_soft_labels_distillation_is_training_on_labels(task):
    x, y = task
    student, plain = network(1), network(1)
    distill(student, network(5), x, y, steps=20, batch=16, alpha=0.0, rate=0.05)
    fit(plain, cross_entropy, Shuffled(x, y, size=16, steps=20), rate=0.05)
    assert torch.allclose(weights(student), weights(plain), atol=1e-4)


@pytest.mark.parametrize("kind", ["model", "list", "logits", "kept"])
def test_every_kind_of_teacher_gives_the_same_student(task, kind):
    x, y = task
    teacher = network(5)
    given = {
        "model": teacher,
        "list": [teacher],
        "logits": cached_logits(teacher, x),
        "kept": cached_logits(teacher, x, top=2, temperature=2.0),  # 2 of 3: nothing is lost
    }[kind]
    one, two = network(1), network(1)
    options = {"steps": 20, "batch": 16, "temperature": 2.0, "rate": 0.05}
    distill(one, teacher, x, y, **options)
    distill(two, given, x, y, **options)
    assert torch.allclose(weights(one), weights(two), atol=1e-4)


def test_keeping_few_classes_changes_the_student(task):
    x, y = task
    one, two, three = network(1), network(1), network(1)
    options = {"steps": 20, "batch": 16, "temperature": 4.0, "rate": 0.05}
    distill(one, network(5), x, y, **options)
    distill(two, network(5), x, y, top=1, **options)
    distill(three, cached_logits(network(5), x), x, y, top=1, **options)
    assert not torch.allclose(weights(one), weights(two), atol=1e-2)
    assert torch.allclose(weights(two), weights(three), atol=1e-4)


def test_the_loop_s_options_are_bound_by_partial(task, tmp_path):
    loop = partial(fit, checkpoint=tmp_path / "c", every=3, decay=0.3)
    distill(network(1), network(5), *task, steps=3, fit=loop)
    assert (tmp_path / "c").is_file()


def test_a_checkpoint_of_another_way_to_distill_is_refused(task, text, tmp_path):
    def go(name, function, *arguments, **options):
        loop = partial(fit, checkpoint=tmp_path / name, every=2)
        function(*arguments, steps=2, fit=loop, **options)

    x, y = task
    go("a", distill, network(1), network(5), x, y, alpha=0.0)
    for other in ({"alpha": 1.0}, {"alpha": 0.0, "batch": 7}, {"alpha": 0.0, "temperature": 2.0}):
        with pytest.raises(ValueError, match="made by another run: recipe differ"):
            go("a", distill, network(1), network(5), x, y, **other)
    go("b", distill_mutual, [network(1), network(2)], x, y)
    with pytest.raises(ValueError, match="made by another run: recipe differ"):
        go("b", distill_mutual, [network(1), network(2)], x, y, weight=2.0)
    go("c", distill_triple, decoder(1), decoder(2), *text)
    with pytest.raises(ValueError, match="made by another run: recipe differ"):
        go("c", distill_triple, decoder(1), decoder(2), *text, weights=(1.0, 1.0, 1.0))


@pytest.mark.parametrize("options", [{"temperature": 4.0}, {"temperature": 2.0, "top": 1}])
def test_a_cache_made_for_something_else_is_refused(task, options):
    kept = cached_logits(network(5), task[0], top=2, temperature=2.0)
    message = r"the cache holds 2 classes at temperature 2.0, .*; give temperature=2.0 and no top"
    with pytest.raises(ValueError, match=message):
        distill(network(1), kept, *task, steps=1, **options)


def test_a_cache_can_be_kept_in_half_precision(task):
    x, y = task
    narrow = cached_logits(network(5), x, top=2, temperature=2.0, dtype=torch.float16)
    assert [t.dtype for t in narrow[:3]] == [torch.int32, torch.float16, torch.float16]
    assert sum(t.nbytes for t in narrow[:3]) == len(x) * (6 * 2 + 2)
    assert cached_logits(network(5), x, dtype=torch.float16).dtype == torch.float16
    one, two = network(1), network(1)
    distill(one, narrow, x, y, steps=20, temperature=2.0, rate=0.05)
    distill(two, network(5), x, y, steps=20, temperature=2.0, rate=0.05, top=2)
    assert torch.allclose(weights(one), weights(two), atol=1e-2)  # 11 bits of a logarithm


def test_a_student_that_diverges_is_told_so(task):
    message = r"the student's logits are not finite: .* has diverged; use a lower rate or a warmup"
    with pytest.raises(FloatingPointError, match=message):
        distill(network(1), network(5), *task, steps=9, rate=1e36)
    with pytest.raises(FloatingPointError, match=message):
        distill_mutual([network(1), network(2)], *task, steps=9, rate=1e36)


def test_a_student_of_three_losses_that_diverges_is_told_so(text):
    """Its norms keep the logits finite; the gradients are not."""
    with pytest.raises(FloatingPointError, match=r"norm is nan at step 2; .* rate below 1e\+36"):
        distill_triple(decoder(1), decoder(2), *text, steps=9, rate=1e36)


def test_without_soft_labels_no_teacher_is_asked(task):
    assert len(distill(network(1), None, *task, steps=2, alpha=0.0).losses) == 2


# --- sequences -----------------------------------------------------------------------------------


def test_what_the_teacher_wrote_is_learned_and_its_prompt_is_not(text):
    prompts, teacher = text[0][:5, :3], decoder(3)
    generator = torch.Generator().manual_seed(1)
    inputs, labels = train.written(teacher, prompts, 4, batch=2, generator=generator)
    assert inputs.shape == labels.shape == (5, 6)
    assert torch.equal(inputs[:, :3], prompts)
    assert (labels[:, :2] == train.IGNORED).all()
    assert torch.equal(labels[:, 2:-1], inputs[:, 3:])
    greedy, last = train.written(teacher, prompts, 4, temperature=0.0)
    assert torch.equal(teacher(greedy)[:, 2:].argmax(-1), last[:, 2:])


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True])
def test_sequence_distillation_is_training_on_what_was_written(text, soft):
    prompts, teacher = text[0][:, :2], decoder(3)
    one, two = decoder(1), decoder(1)
    train.distill_sequences(one, teacher, prompts, 5, steps=4, batch=6, soft=soft, seed=2)
    written = train.written(teacher, prompts, 5, generator=torch.Generator().manual_seed(2))
    options = {"steps": 4, "batch": 6, "temperature": 1.0, "seed": 2}
    distill(two, teacher, *written, alpha=float(soft), **options)
    assert torch.equal(weights(one), weights(two))


@pytest.mark.slow
def test_both_kinds_of_sequence_distillation_bring_a_student_to_its_teacher(text):
    prompts, teacher = text[0][:, :1].repeat(20, 1), decoder(3)
    distill(teacher, None, *text, steps=60, batch=12, alpha=0.0, rate=0.02)  # it learns to count

    def apart(student):
        return losses.forward_kl(student(text[0]), teacher(text[0])).item()

    before = apart(decoder(1))
    for soft in (False, True):
        student = decoder(1)
        options = {"steps": 100, "batch": 32, "rate": 0.02, "soft": soft}
        train.distill_sequences(student, teacher, prompts, 7, **options)
        assert apart(student) < 0.2 * before


@pytest.mark.parametrize("top", [None, 3])
def test_ignored_positions_teach_nothing(text, top):
    x, y = text
    y = y.clone()
    y[:, :4] = train.IGNORED
    teacher = cached_logits(decoder(3), x)
    changed = teacher.clone()
    changed[:, :4] += torch.randn(changed[:, :4].shape, generator=torch.Generator().manual_seed(0))
    one, two = decoder(1), decoder(1)
    for student, target in ((one, teacher), (two, changed)):
        distill(student, target, x, y, steps=5, batch=4, rate=0.05, top=top)
    assert torch.equal(weights(one), weights(two))


@pytest.mark.slow
def test_mutual_students_agree_more_than_those_trained_alone(task):
    x, y = task
    apart = {}
    for weight in (0.0, 5.0):
        pair = [network(1), network(2)]
        distill_mutual(pair, x, y, steps=100, batch=32, rate=0.02, weight=weight)
        apart[weight] = losses.jensen_shannon(pair[0](x), pair[1](x)).item()
    assert apart[5.0] < apart[0.0]


def test_mutual_students_without_weight_are_trained_alone(task):
    pair, alone = [network(1), network(2)], network(1)
    loop = partial(fit, clip=None)  # together they would share one norm
    distill_mutual(pair, *task, steps=10, batch=16, rate=0.02, weight=0.0, fit=loop)
    loop(alone, cross_entropy, Shuffled(*task, size=16, steps=10), rate=0.02)
    assert torch.allclose(weights(pair[0]), weights(alone), atol=1e-5)


def test_the_three_losses_are_the_three_losses(text):
    """The value of the first step against the formula written out with PyTorch's functions."""
    x, y = text
    teacher = decoder(3).eval()
    student = keep_layers(teacher, "blocks", [0, 2])
    done = distill_triple(student, teacher, x, y, steps=1, batch=12)
    small = keep_layers(teacher, "blocks", [0, 2])
    with train.outputs(small, "norm") as mine, train.outputs(teacher, "norm") as theirs:
        s, t = small(x).flatten(0, 1), teacher(x).flatten(0, 1)
    p, q = F.log_softmax(t / 2, -1), F.log_softmax(s / 2, -1)
    soft = F.kl_div(q, p, log_target=True, reduction="batchmean")
    hard = F.cross_entropy(s, y.flatten())
    direction = 1 - F.cosine_similarity(mine[0], theirs[0], dim=-1).mean()
    assert done.losses[0] == pytest.approx((5 * 4 * soft + 2 * hard + direction).item(), rel=1e-5)


def test_a_weight_of_zero_leaves_its_loss_out(text):
    x, y = text
    teacher = decoder(3)
    options = {"steps": 3, "batch": 4, "rate": 0.01}
    one, two = decoder(1), decoder(1)
    distill_triple(one, teacher, x, y, weights=(0.0, 1.0, 0.0), **options)

    def hard(model, batch):
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    fit(two, hard, Shuffled(x, y, size=4, steps=3), rate=0.01)
    assert torch.allclose(weights(one), weights(two), atol=1e-4)
    only = decoder(1)
    distill_triple(only, teacher, x, y, weights=(0.0, 0.0, 1.0), **options)
    assert not torch.allclose(weights(only), weights(two), atol=1e-3)


@pytest.mark.parametrize("bad", [(0, 0, 0), (1, -1, 0)])
def test_impossible_weights_are_refused(text, bad):
    with pytest.raises(ValueError, match=r"none below 0, and one above it, such as \(5, 2, 1\)"):
        distill_triple(decoder(), decoder(), *text, steps=1, weights=bad)


def test_an_unknown_module_is_refused_and_the_hook_is_taken_off(text):
    model = decoder()
    with pytest.raises(ValueError, match=r"no module 'nrom'; there are embed, drop, blocks"):
        distill_triple(model, decoder(1), *text, steps=1, hidden=("nrom", "norm"))
    with train.outputs(model, "norm") as seen:
        model(text[0])
    model(text[0])
    assert len(seen) == 1


def test_a_module_that_returns_no_tensor_is_refused():
    lstm = nn.Sequential(nn.LSTM(3, 2))
    with (
        train.outputs(lstm, "0"),
        pytest.raises(ValueError, match="'0' returns a tuple; name one with a tensor"),
    ):
        lstm(torch.ones(1, 3))
