"""Runs too long for a page: `make results` writes them to book/results/, pages plot them as stored.

Each chapter is a function that yields records; each file says what was run, with what, and when.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from normalize import write_atomically

from compresskit import affine, data, measure, models
from compresskit.affine import QuantSpec
from compresskit.methods import round_to_nearest
from compresskit.model import collect, compress, decoded, layers, size_table, tables

HERE = Path(__file__).resolve().parents[1] / "results"
SHORTEST = 80  # characters: headings and one-line remarks are no paragraphs


def paragraphs(split: tuple[str, ...]) -> list[str]:
    """The paragraphs of a split that are long enough to embed."""
    return [text for text in split if len(text) >= SHORTEST]


def minilm_board(chapter: int, plans: dict[str, dict]) -> Iterator[dict]:
    """One record per plan: bytes, fidelity on held-out paragraphs, mean gap, seconds."""
    encoder, text = models.minilm(), data.pydoc()
    held_out = paragraphs(text.test)
    reference = encoder.encode(held_out)
    stats = collect(encoder, encoder.batches(paragraphs(text.calibration)))
    for name, plan in plans.items():
        start = time.perf_counter()
        small = compress(encoder, plan, stats)
        seconds = time.perf_counter() - start
        kept = measure.fidelity(reference, decoded(small).encode(held_out))
        table = size_table(small)
        linear = [layer for layer in layers(encoder) if layer in plan]
        gaps = [
            measure.gap(layers(encoder)[n].weight, small.get_submodule(n).code, stats[n])
            for n in linear
        ]
        yield {
            "chapter": chapter,
            "model": "minilm",
            "method": name,
            "bytes": table.nbytes,
            "bits_per_weight": table.bits_per_weight,
            "cosine": kept.cosine,
            "top1": kept.top1,
            "gap_bits": sum(gaps) / len(gaps),
            "seconds": round(seconds, 2),
            "stored": True,
        }


def uniform_quantizer() -> Iterator[dict]:
    """Chapter 6: every width and grid, min-max and least squares, on the 36 matrices of MiniLM."""
    encoder = models.minilm()
    fits = {"min-max": affine.minmax, "MSE": affine.mse}
    grids = {"tensor": "tensor", "row": None, "g128": 128, "g32": 32}
    plans = {}
    for bits in (8, 6, 5, 4, 3, 2):
        for grid, size in grids.items():
            for fit_name, fit in fits.items():
                spec = QuantSpec(bits, group_size=size)
                method = partial(round_to_nearest, spec=spec, fit=fit)
                name = f"round-to-nearest int{bits} {grid} {fit_name}"
                plans[name] = dict.fromkeys(layers(encoder), method)
    return minilm_board(6, plans)


def first_compression() -> Iterator[dict]:
    """Chapter 1: 8 bits for the tables, 8 or 4 for the matrices."""
    encoder = models.minilm()
    eight = partial(round_to_nearest, spec=QuantSpec(8))
    four = partial(round_to_nearest, spec=QuantSpec(4, group_size=32))
    rows = dict.fromkeys(tables(encoder), eight)
    plans = {
        "all int8 row": rows | dict.fromkeys(layers(encoder), eight),
        "tables int8 row, matrices int4 g32": rows | dict.fromkeys(layers(encoder), four),
    }
    return minilm_board(1, plans)


CHAPTERS: dict[str, Callable[[], Iterator[dict]]] = {
    "01_first_compression": first_compression,
    "06_uniform_quantizer": uniform_quantizer,
}


def provenance() -> dict:
    """What a reader needs to repeat the run."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE.parent, check=False
    )
    text = data.pydoc()
    return {
        "command": "make results",
        "commit": commit.stdout.strip(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seed": "none: nothing here is random",
        "calibration": f"{len(paragraphs(text.calibration))} paragraphs",
        "test": f"{len(paragraphs(text.test))} paragraphs of at least {SHORTEST} characters",
    }


def write(path: Path, records: list[dict]) -> None:
    """Write records and their provenance, all or nothing, with a checksum of the records."""
    body = json.dumps(records, sort_keys=True).encode()
    whole = {"made": provenance(), "sha256": hashlib.sha256(body).hexdigest(), "records": records}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(whole, indent=1) + "\n")


def main() -> None:
    """Run the chapters named on the command line, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("chapters", nargs="*", choices=[[], *CHAPTERS], default=[])
    for name in parser.parse_args().chapters or CHAPTERS:
        start, records = time.perf_counter(), []
        for record in CHAPTERS[name]():
            records.append(record)
            print(f"{record['method']}: cosine {record['cosine']:.4f}", file=sys.stderr)
        write(HERE / "scoreboard" / f"{name}.json", records)
        print(f"{name}: {len(records)} records in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
