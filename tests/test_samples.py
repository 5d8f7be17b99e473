"""The samples of code in the README and the prose pages run as they are printed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "book").glob("*.md"))]
SAMPLES = [
    pytest.param(code, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, code in enumerate(
        re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    )
]


def test_there_are_samples():
    assert len(SAMPLES) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("code", SAMPLES)
def test_sample_runs_and_writes_the_file_it_names(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "sample", "exec"), {})
    assert all(
        (tmp_path / name).stat().st_size > 10**6 for name in re.findall(r"\w+\.safetensors", code)
    )
