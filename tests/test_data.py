"""The data sets are fixed, their splits disjoint, and reading them disturbs nobody."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch

from compresskit import data

FINGERPRINTS = ["3bb679303497", "09698c42608e", "13dfbdb1a92b"]


@pytest.fixture(scope="module")
def splits():
    return data.pydoc()


def fingerprint(parts):
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def test_the_splits_are_those_every_result_of_the_book_was_made_with(splits):
    assert [len(part) for part in splits] == [1672, 212, 194]
    assert [len(data.text(part)) for part in splits] == [309410, 31952, 32710]
    assert [fingerprint(part) for part in splits] == FINGERPRINTS


def test_no_paragraph_is_in_two_splits_or_twice_in_one(splits):
    together = [paragraph for part in splits for paragraph in part]
    assert len(together) == len(set(together)) == 2078


def test_a_new_paragraph_moves_no_other(splits):
    topics = {"AAA": "A paragraph that Python's manual does not hold.", **data.pydoc_topics()}
    grown = data.assign(data.paragraphs(topics))
    new = set().union(*grown) - set().union(*splits)
    assert new == {topics["AAA"]}
    for before, after in zip(splits, grown, strict=True):
        assert set(after) - new == set(before)


def test_splitting_by_position_would_move_paragraphs(splits):
    """The same check rejects the usual way to split: every tenth paragraph."""
    before = data.paragraphs(data.pydoc_topics())
    after = ("A new first paragraph.", *before)
    assert set(before[::10]) != set(after[::10]) - {after[0]}


def test_the_hash_is_uniform_enough_for_the_stated_proportions(splits):
    total = sum(len(part) for part in splits)
    for part, expected in zip(splits, (0.8, 0.1, 0.1), strict=True):
        spread = (expected * (1 - expected) / total) ** 0.5
        assert abs(len(part) / total - expected) < 4 * spread  # binomial, 4 standard deviations


def test_text_is_the_bytes_of_the_paragraphs_between_blank_lines(splits):
    ids = data.text(splits.test)
    assert ids.dtype == torch.int64
    assert bytes(ids.tolist()).decode().split("\n\n") == list(splits.test)


def test_text_of_no_paragraphs_is_empty():
    assert data.text([]).shape == (0,)


def test_the_whole_manual_has_every_topic_under_its_name():
    text, topics = data.pydoc_text(), data.pydoc_topics()
    assert len(text) == 466_085
    assert all(f"# {name}\n{body}" in text for name, body in topics.items())


def test_the_difference_to_the_installed_manual_counts_paragraphs(monkeypatch):
    changed = dict(data.pydoc_topics())
    name = max(changed, key=lambda name: len(changed[name]))
    changed[name] = "One new paragraph.\n\nAnd another."
    monkeypatch.setattr("pydoc_data.topics.topics", changed)
    difference = data.pydoc_installed_difference()
    assert difference.added == 2
    assert difference.removed > 10


def test_the_same_manual_has_no_difference(monkeypatch):
    monkeypatch.setattr("pydoc_data.topics.topics", data.pydoc_topics())
    assert data.pydoc_installed_difference() == (0, 0)


def test_mnist1d_is_the_published_set():
    sets = data.mnist1d()
    assert [tuple(t.shape) for t in sets] == [(4000, 40), (4000,), (1000, 40), (1000,)]
    assert torch.bincount(torch.cat([sets.train_y, sets.test_y])).tolist() == [500] * 10
    x = torch.cat([sets.train_x, sets.test_x]).double()
    assert abs(x.mean()) < 1e-6  # float32 rounding of standardized values
    assert abs(x.std(correction=0) - 1) < 1e-6


def test_digits_are_scaled_and_split_by_content():
    sets = data.digits()
    assert [tuple(t.shape) for t in sets] == [(1423, 64), (1423,), (374, 64), (374,)]
    assert sets.train_x.min() == 0
    assert sets.train_x.max() == 1
    train = {tuple(row.tolist()) for row in sets.train_x}
    assert not any(tuple(row.tolist()) in train for row in sets.test_x)


@pytest.mark.parametrize("load", [data.pydoc, data.mnist1d, data.digits])
def test_loading_is_deterministic_and_leaves_every_random_state_alone(load):
    def states():
        return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()

    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    before, first = states(), load()
    random.seed(4)
    np.random.seed(4)
    second = load()
    random.seed(3)
    np.random.seed(3)
    assert states() == before
    load()
    assert states() == before
    assert all(
        torch.equal(a, b) if torch.is_tensor(a) else a == b
        for a, b in zip(first, second, strict=True)
    )


def test_an_asset_with_one_flipped_bit_is_refused(tmp_path):
    content = bytearray(data.asset("pydoc_topics.xz"))
    content[1000] ^= 1
    (tmp_path / "pydoc_topics.xz").write_bytes(content)
    record = (data.ASSETS / "pydoc_topics.json").read_text()
    (tmp_path / "pydoc_topics.json").write_text(record)
    with pytest.raises(ValueError, match=r"has SHA-256 .* the file is corrupt"):
        data.asset("pydoc_topics.xz", folder=tmp_path)


def test_a_missing_asset_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.xz is missing"):
        data.asset("nothing.xz", folder=tmp_path)


def test_the_record_beside_the_snapshot_names_version_and_licence():
    record = json.loads((data.ASSETS / "pydoc_topics.json").read_text())
    assert record["python"] == "3.11.7"
    assert "PSF" in record["licence"]
