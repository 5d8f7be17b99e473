"""The tools of `book/_tools`: notebooks in one form, executed side by side, failures not hidden."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from compresskit import show

ROOT = Path(__file__).parent.parent
TOOLS = ROOT / "book" / "_tools"


@pytest.fixture
def normalize(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import normalize

    return normalize


def untidy():
    return new_notebook(
        metadata={"kernelspec": {"name": "other", "display_name": "x"}, "vscode": {"a": 1}},
        cells=[
            new_markdown_cell("# Title", metadata={"collapsed": True}),
            new_code_cell(
                "draw()",
                execution_count=7,
                metadata={"tags": ["identity"], "execution": {"iopub.execute_input": "10:00"}},
                outputs=[
                    new_output("stream", name="stdout", text="one "),
                    new_output("stream", name="stdout", text="line\n"),
                    new_output("stream", name="stderr", text="and this\n"),
                    new_output(
                        "display_data", {"text/plain": "<Figure>", "image/svg+xml": "<svg/>"}
                    ),
                ],
            ),
            new_code_cell("1", outputs=[new_output("execute_result", {"text/plain": "1"})]),
        ],
    )


def test_text_is_kept_and_images_and_times_are_not(normalize):
    _, first, second = normalize.normalize(untidy()).cells
    assert [o.get("text") for o in first.outputs] == ["one line\n", "and this\n", None]
    assert first.outputs[2].data == {"text/plain": "<Figure>"}
    assert first.metadata == {"tags": ["identity"]}
    assert [first.execution_count, second.execution_count] == [1, 2]
    assert second.outputs[0].execution_count == 2


def test_normalizing_twice_changes_nothing_more(normalize, tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(untidy(), path)
    before = path.read_text()
    assert normalize.main([str(path)]) == 0
    once = path.read_text()
    assert once != before
    assert normalize.main([str(path)]) == 0
    assert path.read_text() == once
    assert normalize.main(["--check", str(path)]) == 0


def test_asking_does_not_write(normalize, tmp_path):
    path = tmp_path / "a.ipynb"
    nbformat.write(untidy(), path)
    before = path.read_bytes()
    assert normalize.main(["--check", str(path)]) == 1
    assert path.read_bytes() == before


def test_a_notebook_survives_an_interrupted_write(normalize, tmp_path, monkeypatch):
    path = tmp_path / "a.ipynb"
    nbformat.write(untidy(), path)
    before = path.read_bytes()

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        normalize.main([str(path)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def execute(*arguments):
    return subprocess.run(
        [sys.executable, TOOLS / "execute.py", "--jobs=2", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_one_failure_fails_the_run_but_not_the_others(tmp_path):
    good, bad, page = (tmp_path / name for name in ("good.ipynb", "bad.ipynb", "page.md"))
    nbformat.write(new_notebook(cells=[new_code_cell("print(1)")]), good)
    nbformat.write(new_notebook(cells=[new_code_cell("assert 1 == 2, 'not so'")]), bad)
    page.write_text("# A page without code\n")
    cache = f"--cache={tmp_path / 'cache'}"

    first = execute(cache, good, bad, page)
    assert first.returncode == 1
    assert "2 of 3 pages" in first.stdout
    assert "bad FAILED" in first.stdout
    assert "not so" in first.stdout
    assert "good" in first.stdout.replace("good FAILED", "")

    second = execute(cache, good)
    assert second.returncode == 0
    assert "0 of 1 pages" in second.stdout


@pytest.mark.slow
def test_running_in_place_stores_the_text_in_canonical_form(tmp_path, normalize):
    path = tmp_path / "a.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("print(6 * 7)")]), path)
    assert execute("--inplace", path).returncode == 0
    assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == "42\n"
    assert normalize.main(["--check", str(path)]) == 0


# --- long runs ---------------------------------------------------------------------------------


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(TOOLS))
    import results

    monkeypatch.setattr(results, "HERE", tmp_path / "stored")
    monkeypatch.setattr(results, "PARTIAL", tmp_path / "partial")
    return results


def squares(results, die_at=None):
    def square(seed, power=2):
        if seed == die_at:
            raise KeyboardInterrupt
        squares.calls.append(seed)
        return {"value": seed**power}

    return results.grid(square, seed=range(4))


def test_a_killed_run_repeats_only_what_it_had_not_finished(results, tmp_path):
    squares.calls = []
    with pytest.raises(KeyboardInterrupt):
        results.finished("run", squares(results, die_at=2), tmp_path)
    records, seconds = results.finished("run", squares(results), tmp_path)
    assert squares.calls == [0, 1, 2, 3]
    assert records == [{"seed": n, "power": 2, "value": n**2} for n in range(4)]
    assert seconds >= 0


def test_experiments_with_equal_settings_and_changed_defaults_are_not_taken_for_each_other(
    results, tmp_path
):
    def square(seed, power=2):
        return {"value": seed**power}

    def cube(seed, power=3):
        return {"value": seed**power}

    def both():
        yield from results.grid(square, seed=[2])
        yield from results.grid(cube, seed=[2])

    records, _ = results.finished("run", both(), tmp_path)
    assert [record["value"] for record in records] == [4, 8]

    def square(seed, power=4):  # noqa: F811, the same name on purpose
        return {"value": seed**power}

    records, _ = results.finished("run", results.grid(square, seed=[2]), tmp_path)
    assert [record["value"] for record in records] == [16]


def test_what_is_stored_can_be_shown(results, monkeypatch, capsys):
    squares.calls = []
    monkeypatch.setitem(results.RUNS, "squares", lambda: squares(results))
    monkeypatch.setattr(sys, "argv", ["results.py", "squares"])
    results.main()
    assert not list(results.PARTIAL.rglob("*.json"))
    monkeypatch.setattr(show, "RESULTS", results.HERE)
    assert [record["value"] for record in show.stored("squares")] == [0, 1, 4, 9]
    assert "4 records of `make results`" in capsys.readouterr().out


def test_every_stored_run_is_one_that_make_results_makes(results):
    folder = ROOT / "book" / "results"
    stored = {str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.json")}
    assert stored == set(results.RUNS)


@pytest.mark.parametrize("path", sorted((ROOT / "book" / "results").rglob("*.json")), ids=str)
def test_the_stored_records_are_of_the_settings_that_their_run_has(results, path):
    name = str(path.relative_to(ROOT / "book" / "results").with_suffix(""))
    tasks = results.RUNS[name]()
    asked = [results.settings_of(settings, task) for settings, task in tasks]
    stored = json.loads(path.read_text())["records"]
    found = [
        {key: record.get(key) for key in settings}
        for settings, record in zip(asked, stored, strict=True)
    ]
    assert found == asked
