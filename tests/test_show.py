"""Claims can fail; figures follow the page."""

import hashlib
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from compresskit import show


def test_a_true_claim_is_printed(capsys):
    show.claim("1 < 2", 1 < 2)
    show.claim("so says a tensor", torch.tensor(True))
    assert capsys.readouterr().out == "✓ 1 < 2\n✓ so says a tensor\n"


@pytest.mark.parametrize("false", [False, torch.tensor(False), np.float64(1) > 2])
def test_a_false_claim_stops_the_notebook(false, capsys):
    with pytest.raises(AssertionError, match="this claim is false: 2 < 1"):
        show.claim("2 < 1", false)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("number", [1, 0.0, float("nan"), torch.tensor(1.0), "yes", None])
def test_what_is_neither_true_nor_false_is_no_claim(number):
    with pytest.raises(TypeError, match="give a bool"):
        show.claim("a number", number)


def test_a_plot_names_its_curves_at_their_ends():
    ax = show.plot(
        {"up": ([0, 1], [0, 2]), "_quiet": ([0, 1], [1, 1])}, xlabel="x", ylabel="y (dB)"
    )
    (note,) = ax.texts
    assert (note.get_text(), note.xy) == ("up", (1, 2))
    assert note.get_color() == ax.lines[0].get_color()
    assert len(ax.lines) == 2
    plt.close("all")


def test_axes_come_in_grids():
    grid = show.axes("x", "y", rows=2, columns=3)
    assert grid.shape == (2, 3)
    assert {ax.get_xlabel() for ax in grid.flat} == {"x"}
    plt.close("all")


def test_cost_is_told_in_seconds_and_mebibytes(capsys):
    show.cost()
    words = capsys.readouterr().out.split()
    assert int(words[words.index("MiB") - 1]) > 50  # an interpreter with torch in it


def test_stored_records_come_with_their_origin(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(show, "RESULTS", tmp_path)
    records = [{"seed": 0, "accuracy": 0.5}, {"seed": 1, "accuracy": 0.6}]
    content = json.dumps(records, sort_keys=True).encode()
    made = {
        "command": "make results",
        "date": "2026-01-02",
        "seconds": 119,
        "machine": "x, 2 cores",
    }
    whole = {"made": made, "sha256": hashlib.sha256(content).hexdigest(), "records": records}
    (tmp_path / "a.json").write_text(json.dumps(whole))
    assert show.stored("a") == records
    expected = "stored: 2 records of `make results`, 2026-01-02, 2 min on x, 2 cores\n"
    assert capsys.readouterr().out == expected
    whole["records"][1]["accuracy"] = 0.9
    (tmp_path / "a.json").write_text(json.dumps(whole))
    with pytest.raises(ValueError, match="was changed by hand; restore it with git"):
        show.stored("a")
    with pytest.raises(ValueError, match="no stored run 'b'; there are a; `make results`"):
        show.stored("b")
