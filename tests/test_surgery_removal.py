"""Neurons, heads and channels taken out of a model."""

import copy

import pytest
import torch
from torch import nn

from compresskit import container, models
from compresskit.affine import QuantSpec
from compresskit.methods import round_to_nearest
from compresskit.model import collect, compress, layers
from compresskit.models.decoder import Decoder, DecoderConfig, sample
from compresskit.models.encoder import EncoderConfig, SentenceEncoder
from compresskit.stats import InputStats
from compresskit.surgery import (
    Units,
    filter_norms,
    keep_layers,
    remove,
    rotate,
    unit_scores,
    units,
    weakest,
    zeroed,
)

# float64 models: only the order of additions differs between the small and the masked one.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def seeded(build):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().double().eval()


def decoder(kv_heads=2):
    return seeded(
        lambda: Decoder(
            DecoderConfig(
                vocab=16, width=32, layers=2, heads=4, kv_heads=kv_heads, hidden=24, context=12
            )
        )
    )


def encoder():
    shape = EncoderConfig(vocab=16, positions=12, width=32, layers=2, heads=4, hidden=24)
    return seeded(lambda: SentenceEncoder(shape, None))


def chain(*stages):
    return seeded(lambda: nn.Sequential(*stages))


def pooled():
    return chain(
        *(nn.Unflatten(1, (2, 6, 6)), nn.Conv2d(2, 5, 3, bias=False), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(5, 3, 2, padding=1, padding_mode="circular"), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(27, 7), nn.Dropout(), nn.Linear(7, 2, bias=False)),
    )


IDS = torch.arange(12).repeat(2, 1)


def inputs(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


FAMILIES = {
    "decoder": (lambda: decoder(4), IDS),
    "grouped queries": (lambda: decoder(2), IDS),
    "one key head": (lambda: decoder(1), IDS),
    "rotated decoder": (lambda: rotate(decoder(2)), IDS),
    "encoder": (encoder, IDS),
    "mlp": (lambda: models.mnist1d_mlp().double(), inputs(5, 40)),
    "digits mlp": (lambda: models.digits_mlp().double(), inputs(5, 64)),
    "cnn along a line": (lambda: models.mnist1d_cnn().double(), inputs(5, 40)),
    "cnn": (lambda: models.digits_cnn().double(), inputs(5, 64)),
    "pooled cnn": (pooled, inputs(5, 72)),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    build, x = FAMILIES[request.param]
    return build(), x


def some(model, *, seed=0):
    """A random choice that `remove` accepts: heads, neurons and channels of every place at once."""
    generator = torch.Generator().manual_seed(seed)

    def chosen(count, least=0):
        fewer = int(torch.randint(least, count, (), generator=generator)) if count > least else 0
        return torch.randperm(count, generator=generator)[:fewer].tolist()

    found = units(model)
    queries = [name for name, part in found.items() if part.kind == "query head"]
    removed = {n: chosen(p.count, min(1, p.count - 1)) for n, p in found.items()}
    for name in queries:  # as many of each group, each group its own
        groups = found[name].count // found[name[:-1] + "v"].count
        fewer = int(torch.randint(groups, (), generator=generator))
        removed[name] = [
            start + int(i)
            for start in range(0, found[name].count, groups)
            for i in torch.randperm(groups, generator=generator)[:fewer]
        ]
    return removed


def silenced(model, removed, x):
    """Outputs of the untouched model when what the readers read of these units is set to zero."""
    model = copy.deepcopy(model)

    def silence(part, places, layer, args):
        if isinstance(layer, nn.Conv2d):
            size, axis = 1, 1
        else:
            size, axis = part.columns, -1
        dead = torch.zeros(part.count, dtype=torch.bool)
        dead[places] = True
        shape = [1] * args[0].ndim
        shape[axis] = -1
        return args[0].masked_fill(dead.repeat_interleave(size).view(shape), 0)

    for name, places in removed.items():
        part = units(model)[name]
        model.get_submodule(part.reader).register_forward_pre_hook(
            lambda layer, args, part=part, places=places: silence(part, places, layer, args)
        )
    return model(x)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_the_smaller_model_computes_what_the_masked_one_computes(family, seed):
    model, x = family
    removed = some(model, seed=seed)
    small, masked = remove(model, removed), zeroed(model, removed)
    torch.testing.assert_close(small(x), masked(x), **EXACT)
    torch.testing.assert_close(small(x), silenced(model, removed, x), **EXACT)
    assert not torch.allclose(small(x), model(x), rtol=1e-3), "the units meant nothing"


@torch.no_grad()
def test_a_shift_by_one_unit_is_noticed(family):
    model, x = family
    name, part = max(units(model).items(), key=lambda item: item[1].count)
    small = remove(model, {name: [0]})
    assert not torch.allclose(small(x), zeroed(model, {name: [part.count - 1]})(x), rtol=1e-6)


@torch.no_grad()
def test_removing_nothing_keeps_every_bit(family):
    model, x = family
    same = remove(model, dict.fromkeys(units(model), ()))
    assert torch.equal(same(x), model(x))
    assert all(
        torch.equal(tensor, same.state_dict()[name]) for name, tensor in model.state_dict().items()
    )


@torch.no_grad()
def test_the_model_itself_is_left_as_it_was_and_shares_nothing(family):
    model, x = family
    before, expected = copy.deepcopy(model.state_dict()), model(x)
    removed = some(model)
    for made in (remove(model, removed), zeroed(model, removed)):
        for parameter in made.parameters():
            parameter.fill_(7)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@torch.no_grad()
def test_two_steps_remove_what_one_step_removes(family):
    model, x = family
    names = [name for name, part in units(model).items() if part.count > 2 and name[-1] != "q"]
    once = remove(model, {name: [0, 2] for name in names})
    twice = remove(remove(model, {name: [2] for name in names}), {name: [0] for name in names})
    assert torch.equal(once(x), twice(x))


@torch.no_grad()
def test_the_weights_of_a_smaller_model_fit_another_of_its_make(family):
    model, x = family
    small = remove(model, some(model))
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.fill_(0.5)
    other = remove(other, some(model))
    other.load_state_dict(small.state_dict())
    assert torch.equal(other(x), small(x))


@torch.no_grad()
def test_parameters_that_need_gradients_still_do(family):
    model, _ = family
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    next(iter(layers(model).values())).weight.requires_grad_(True)
    small = remove(model, some(model))
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in small.named_parameters() if p.requires_grad} == expected


def parameters(model):
    return sum(p.numel() for p in model.parameters())


# name -> model, what goes, and how many parameters that is, by hand
SIZES = {
    "a neuron between two linear layers: 40 + bias in, 128 out": (
        models.mnist1d_mlp,
        {"linear1": [5, 7]},
        2 * (40 + 1 + 128),
    ),
    "a channel between two convolutions: 1 x 3 x 3 + bias in, 32 x 3 x 3 out": (
        models.digits_cnn,
        {"conv1": [0]},
        9 + 1 + 288,
    ),
    "a channel before the head: 32 x 3 x 3 + bias in, 10 x 2 x 2 out": (
        models.digits_cnn,
        {"conv3": [1, 63]},
        2 * (288 + 1 + 40),
    ),
    "channels on both sides: the 3 x 3 entries between them go once": (
        models.digits_cnn,
        {"conv1": [0], "conv2": [0]},
        (9 + 1 + 288) + (16 * 9 + 1 + 64 * 9) - 9,
    ),
    "a SwiGLU neuron: a row of gate and of up, a column of down": (
        decoder,
        {"blocks.1.mlp.up": [0, 3, 4]},
        3 * 3 * 32,
    ),
    "a key head, its values and its two queries": (
        decoder,
        {"blocks.0.attn.v": [1]},
        8 * 32 * (2 + 1 + 1 + 2),
    ),
    "a query head of each group": (decoder, {"blocks.0.attn.q": [1, 2]}, 2 * 8 * 32 * 2),
    "an encoder's head: three slices with biases, one column slice": (
        encoder,
        {"encoder.layer.0.attention.self.value": [2]},
        3 * 8 * (32 + 1) + 8 * 32,
    ),
    "an encoder's neuron": (encoder, {"encoder.layer.1.intermediate.dense": [9]}, 32 + 1 + 32),
}


@pytest.mark.parametrize("case", SIZES)
def test_the_number_of_parameters_is_that_computed_by_hand(case):
    build, removed, fewer = SIZES[case]
    model = build()
    assert parameters(model) - parameters(remove(model, removed)) == fewer
    assert parameters(model) == parameters(zeroed(model, removed))
    zeros = [
        sum(int((p == 0).sum()) for p in m.parameters()) for m in (model, zeroed(model, removed))
    ]
    assert zeros[1] - zeros[0] == fewer


def test_layers_say_the_shapes_they_have():
    for build, _ in FAMILIES.values():
        model = build()
        small = remove(model, some(model))
        for layer in layers(small).values():
            sizes = (
                ("in", "out", "features") if layer.weight.ndim == 2 else ("in", "out", "channels")
            )
            said = tuple(getattr(layer, f"{way}_{sizes[2]}") for way in sizes[1::-1])
            assert said == tuple(layer.weight.shape[:2])


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_decoder_with_fewer_heads_samples_with_kept_keys(kv_heads):
    small = remove(decoder(kv_heads), some(decoder(kv_heads), seed=2))
    prompt = torch.tensor([[3, 1, 4]])
    ids = sample(small, prompt, 8, temperature=0)
    for length in range(3, 11):
        assert small(ids[:, :length])[:, -1].argmax(-1) == ids[:, length]


@torch.no_grad()
def test_real_models_shrink():
    text = [
        "Remove what is not used.",
        "A longer text about something else, such as a sparse matrix.",
    ]
    model = models.minilm()
    removed = weakest(unit_scores(model), 0.25)
    assert {len(places) for places in removed.values()} == {3, 384}
    small = remove(model, removed)
    # float32: rounding differs with the number of columns that are added up
    torch.testing.assert_close(
        small.encode(text), zeroed(model, removed).encode(text), rtol=0, atol=1e-5
    )
    shorter = keep_layers(small, "encoder.layer", [0, 2, 4])
    assert shorter.encode(text).norm(dim=1) == pytest.approx([1, 1], abs=1e-5)


@torch.no_grad()
def test_the_byte_model_shrinks():
    model = models.pydoc_lm()
    removed = weakest(unit_scores(model), 0.25)
    ids = torch.arange(32, 96)[None]
    expected = zeroed(model, removed)(ids)
    # float32, logits of about 10
    torch.testing.assert_close(remove(model, removed)(ids), expected, rtol=0, atol=1e-3)


def test_a_smaller_model_is_compressed_and_stored_like_any_other(tmp_path):
    model = decoder().float()
    removed = {"blocks.0.attn.v": [0], "blocks.1.mlp.up": [2, 3]}
    small = remove(model, removed)
    method = lambda weight, stats: round_to_nearest(weight, spec=QuantSpec(8))  # noqa: E731
    coded = compress(small, dict.fromkeys(layers(small), method))
    container.save(coded, tmp_path / "small")
    loaded = container.load(tmp_path / "small", remove(model, removed))
    assert torch.equal(loaded(IDS), coded(IDS))
    with pytest.raises(ValueError, match="does not fit the model"):
        container.load(tmp_path / "small", model)


def test_units_are_found_where_they_can_be_removed():
    found = units(pooled())
    assert found == {
        "1": Units("channel", 5, {"1": 1}, "4", 4),
        "4": Units("channel", 3, {"4": 1}, "7", 9),
        "7": Units("neuron", 7, {"7": 1}, "9", 1),
    }
    kinds = {part.kind for part in units(decoder(2)).values()}
    assert kinds == {"query head", "head", "neuron"}
    assert {part.kind for part in units(decoder(4)).values()} == {"head", "neuron"}


LINEAR = nn.Linear(6, 6)
BETWEEN = {
    "a norm mixes the channels": (nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 1)),
    "a softmax mixes the neurons": (LINEAR, nn.Softmax(-1), nn.Linear(6, 2)),
    "a linear layer along an image's lines": (nn.Conv2d(6, 6, 1), nn.ReLU(), LINEAR),
    "a flattening that starts elsewhere": (nn.Conv2d(2, 3, 1), nn.Flatten(2), nn.Linear(9, 2)),
    "neurons at several positions, flattened": (LINEAR, nn.Flatten(), nn.Linear(12, 2)),
    "grouped convolution": (nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1)),
    "nothing after it": (LINEAR, nn.ReLU()),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_what_mixes_units_hides_them(case):
    assert units(nn.Sequential(*BETWEEN[case])) == {}


@torch.no_grad()
def test_scores_are_the_squared_change_of_the_readers_output(family):
    model, x = family
    stats = collect(model, [x])
    scores = unit_scores(model, stats)
    for name, part in units(model).items():
        reader, seen = model.get_submodule(part.reader), []
        hook = reader.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(x)
        hook.remove()
        axis, size = (1, 1) if isinstance(reader, nn.Conv2d) else (-1, part.columns)
        for unit in (0, part.count - 1):
            without = seen[0].clone()
            without.narrow(axis, unit * size, size).zero_()
            change = (reader(seen[0]) - reader(without)).square().sum(axis).mean().item()
            # the moments are float32
            assert scores[name][unit].item() == pytest.approx(change, rel=1e-4)


def test_without_moments_the_score_is_that_of_isotropic_inputs(family):
    model, _ = family
    eye = {n: InputStats.isotropic(m.weight.flatten(1).shape[1]) for n, m in layers(model).items()}
    with_eye, without = unit_scores(model, eye), unit_scores(model)
    assert with_eye.keys() == without.keys()
    for name, score in without.items():
        torch.testing.assert_close(with_eye[name], score, **EXACT)


def test_filter_norms_are_sums_of_absolute_weights():
    model = models.digits_cnn()
    expected = [sum(abs(w) for w in row) for row in model.conv2.weight.flatten(1).tolist()]
    assert filter_norms(model)["conv2"].tolist() == pytest.approx(expected, rel=1e-9)
    block = decoder().blocks[0]
    both = sum(m.weight[3].abs().sum() for m in (block.mlp.gate, block.mlp.up)).item()
    assert filter_norms(decoder())["blocks.0.mlp.up"][3].item() == pytest.approx(both)


def test_the_weakest_are_the_smallest_the_first_of_equals_and_never_all():
    scores = {"a": torch.tensor([3.0, 1.0, 1.0, 1.0]), "b": torch.tensor([2.0, 1.0])}
    assert weakest(scores, 0.5) == {"a": [1, 2], "b": [1]}
    assert weakest(scores, 0.0) == {"a": [], "b": []}
    assert weakest(scores, 1.0) == {"a": [1, 2, 3], "b": [1]}
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="give one from 0 to 1"):
            weakest(scores, wrong)


REFUSED = {
    "no units": ({"head": [0]}, r"no units are named \['head'\]; the model has \['conv1', 'conv2'"),
    "too large": ({"conv1": [16]}, "'conv1': places .16. of 16; name places from 0 to 15"),
    "negative": ({"conv1": [-1]}, "each once"),
    "twice": ({"conv1": [3, 3]}, "each once"),
    "all": ({"conv1": range(16)}, "all 16 units; leave one or more"),
    "fractions": ({"conv1": [0.5]}, r"give whole numbers, such as \[0, 2\]"),
    "no sequence": ({"conv1": 3}, "give whole numbers"),
}


@pytest.mark.parametrize("function", [remove, zeroed])
@pytest.mark.parametrize("case", REFUSED)
def test_units_that_are_not_there_are_refused(function, case):
    removed, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        function(models.digits_cnn(), removed)


@pytest.mark.parametrize(
    "removed",
    [
        {"blocks.0.attn.q": [0]},
        {"blocks.0.attn.q": [0, 1]},
        {"blocks.0.attn.q": [0, 1, 2]},
        {"blocks.0.attn.q": [2, 3], "blocks.0.attn.v": [0]},
    ],
)
def test_uneven_groups_of_queries_are_refused(removed):
    with pytest.raises(ValueError, match="leave equally many, one or more, with each"):
        remove(decoder(2), removed)


@torch.no_grad()
@pytest.mark.parametrize("removed", [{"q": [0, 2]}, {"q": [1, 2]}, {"q": [0, 1, 2], "v": [0]}])
def test_even_groups_of_queries_shrink(removed):
    model, removed = decoder(2), {f"blocks.0.attn.{name}": p for name, p in removed.items()}
    small = remove(model, removed)
    assert small.blocks[0].attn.groups == 1
    assert small.blocks[1].attn.groups == 2
    torch.testing.assert_close(small(IDS), silenced(model, removed, IDS), **EXACT)


def test_models_without_known_units_are_refused():
    with pytest.raises(ValueError, match="a Linear; known are the units of a Decoder"):
        units(nn.Linear(2, 2))
    model = models.digits_mlp()
    coded = compress(model, {"head": lambda w, s: round_to_nearest(w, spec=QuantSpec(8))})
    with pytest.raises(ValueError, match="remove units first, then compress"):
        remove(coded, {"linear1": [0]})
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    with pytest.raises(ValueError, match="tied"):
        remove(tied, {"0": [0]})


def test_scores_need_the_moments_of_every_reader():
    with pytest.raises(ValueError, match="no moments of 'linear2'; collect them"):
        unit_scores(models.digits_mlp(), {})


def test_what_pools_over_units_or_counts_them_lies_between_no_two_layers():
    pooled = nn.Sequential(nn.Linear(8, 8), nn.MaxPool2d(3, 1, 1), nn.Linear(8, 2))
    normed = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3))
    assert units(pooled) == units(normed) == {}
    with pytest.raises(ValueError, match="such as BatchNorm"):
        remove(normed, {"0": [1]})


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"scores of \['b'\] hold NaN"):
        weakest({"a": torch.ones(2), "b": torch.tensor([torch.nan, 1.0])}, 0.5)
