"""The data of the book, the same on every machine: Python's manual, MNIST-1D, and digits.

The text is a compressed snapshot, since the manual changes with every patch release of Python;
the two image sets come from installed packages.
"""

import hashlib
import json
import lzma
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"


class Splits(NamedTuple):
    """Three disjoint tuples of paragraphs: to fit on, to choose on, and to report on."""

    train: tuple[str, ...]
    calibration: tuple[str, ...]
    test: tuple[str, ...]


class Dataset(NamedTuple):
    """Inputs (N, d) in float32 and labels (N,) in int64, for training and for testing."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


class Difference(NamedTuple):
    """Numbers of paragraphs that only the running Python, and only the snapshot, has."""

    added: int
    removed: int


def asset(name: str, *, folder: Path = ASSETS) -> bytes:
    """Return the bytes of a file whose SHA-256 equals the one recorded in the JSON beside it.

    Parameters
    ----------
    name : file name, such as "pydoc_lm.safetensors", whose record is "pydoc_lm.json"
    folder : where both lie

    Raises
    ------
    ValueError : the file is missing, or its bytes are not those that were recorded
    """
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it with git, or run `make models`")
    content = path.read_bytes()
    expected = json.loads(path.with_suffix(".json").read_text())["sha256"]
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} has SHA-256 {found[:12]}..., but {path.stem}.json records {expected[:12]}...; "
            f"the file is corrupt: restore it with git, or run `make models`"
        )
    return content


def split_of(content: bytes) -> float:
    """The content's place in [0, 1): the first 64 bits of its SHA-256, divided by 2^64.

    It depends on nothing else, so a new item moves no other item from one split to another.
    """
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64


def paragraphs(topics: dict[str, str]) -> tuple[str, ...]:
    """The distinct paragraphs (parts between blank lines) of the topics in sorted order.

    Exact repetitions are dropped: topics quote each other, and a paragraph seen in training would
    be no test.
    """
    joined = "\n\n".join(topics[name] for name in sorted(topics))
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", joined))
    return tuple(dict.fromkeys(part for part in parts if part.strip()))


def assign(parts: Sequence[str]) -> Splits:
    """Send each paragraph to train, calibration or test with chances 0.8, 0.1, 0.1 by its hash."""
    splits = [], [], []
    for part in parts:
        place = split_of(part.encode())
        splits[(place >= 0.8) + (place >= 0.9)].append(part)
    return Splits(*map(tuple, splits))


def pydoc_topics() -> dict[str, str]:
    """Python's own manual pages: {topic: text} as `help()` of Python 3.11.7 shows them.

    The same whatever Python runs; `pydoc_installed_difference` compares.

    Notes
    -----
    Copyright Python Software Foundation, PSF License Version 2 (assets/LICENSE-PSF.txt).
    """
    return json.loads(lzma.decompress(asset("pydoc_topics.xz")))


def pydoc() -> Splits:
    """The distinct paragraphs of Python's manual pages, each sent to a split by its own hash.

    Returns
    -------
    Splits of about 8 : 1 : 1; a paragraph's split depends on its text alone
    """
    return assign(paragraphs(pydoc_topics()))


def pydoc_text() -> str:
    """The whole manual as one string, a heading line `# topic` before each topic."""
    return "\n\n".join(f"# {name}\n{text}" for name, text in sorted(pydoc_topics().items()))


def pydoc_installed_difference() -> Difference:
    """Count the paragraphs in which the running Python's manual differs from the snapshot."""
    from pydoc_data.topics import topics

    ours, theirs = set(paragraphs(pydoc_topics())), set(paragraphs(topics))
    return Difference(len(theirs - ours), len(ours - theirs))


def text(parts: Sequence[str]) -> Tensor:
    """The UTF-8 bytes of the paragraphs joined by blank lines, as token ids for a byte model.

    Parameters
    ----------
    parts : paragraphs, such as `pydoc().test`

    Returns
    -------
    (bytes,) int64 tensor with values 0..255

    Examples
    --------
    >>> text(["a", "b"]).tolist()
    [97, 10, 10, 98]
    """
    joined = "\n\n".join(parts).encode()
    return torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).astype(np.int64))


def mnist1d() -> Dataset:
    """MNIST-1D: 4000 + 1000 noisy, shifted, sheared one-dimensional drawings of the ten digits.

    Returns
    -------
    Dataset with inputs (4000, 40) and (1000, 40), mean 0 and standard deviation 1 over all

    Raises
    ------
    ImportError : the package mnist1d is not installed

    References
    ----------
    Greydanus and Kobak, "Scaling down deep learning with MNIST-1D", arXiv 2011.14439.
    Apache License 2.0. Computed from the authors' seed 42; the global random states that their
    code sets are put back.
    """
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; run `pip install mnist1d==0.0.2.post1`") from error
    states = random.getstate(), np.random.get_state()
    try:
        raw = make_dataset(get_dataset_args())
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    floats, labels = torch.float32, torch.int64
    parts = {"x": floats, "y": labels, "x_test": floats, "y_test": labels}
    return Dataset(*(torch.tensor(raw[name], dtype=dtype) for name, dtype in parts.items()))


def digits() -> Dataset:
    """scikit-learn's 1797 handwritten digits of 8x8 pixels, gray levels 0..16 scaled to [0, 1].

    Returns
    -------
    Dataset with inputs (N, 64); an image is for testing if its hash falls in the last fifth

    References
    ----------
    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
    Repository, 1998, doi 10.24432/C50P49, CC BY 4.0; the part that `sklearn.datasets` ships.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    test = torch.tensor([split_of(image.astype(np.uint8).tobytes()) >= 0.8 for image in raw.data])
    x = torch.tensor(raw.data, dtype=torch.float32) / 16
    y = torch.tensor(raw.target, dtype=torch.int64)
    return Dataset(x[~test], y[~test], x[test], y[test])
