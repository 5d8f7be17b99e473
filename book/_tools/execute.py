"""Run notebooks side by side, one kernel each, on the cores there are.

`--cache DIR` puts the results where the build of the book looks for them and runs only what is
not there yet; `--inplace` runs everything and writes the text outputs back into the notebooks.
When a notebook fails the others still run, its traceback is shown, and the exit status is 1.
"""

import argparse
import asyncio
import os
import sys
import time
from pathlib import Path

import nbformat
import psutil
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from myst_nb.core.config import NbParserConfig
from myst_nb.core.read import create_nb_reader
from myst_parser.config.main import MdParserConfig
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from normalize import canonical_text, write_atomically

TIMEOUT = 300  # seconds a single cell may take
MEMORY = 3 * 2**30  # bytes a chapter may take, so this much is set aside for each kernel
FAILURES = (CellExecutionError, CellTimeoutError, DeadKernelError)


def read(path):
    """The notebook as the book's own reader sees it, so that both ask the cache for one key.

    A page in Markdown that holds no code gives None.
    """
    text = path.read_text(encoding="utf-8")
    reader = create_nb_reader(str(path), MdParserConfig(), NbParserConfig(), text)
    return reader and reader.read(text)


def peak_memory(pid):
    """The most memory a process has held, in bytes; None where the system keeps no count."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


async def execute(path, notebook):
    """Run the cells of `notebook`, in place; the seconds it took, and a note on its memory."""
    note = ""

    def look(cell, cell_index):
        nonlocal note
        if peak := peak_memory(client.km.provisioner.pid):
            note = f", {peak / 2**20:.0f} MiB"

    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        record_timing=False,  # timings in a cell's metadata would change its key
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_complete=look,
        extra_arguments=["--IPKernelApp.log_level=40"],
    )
    start = time.perf_counter()
    await client.async_execute()
    return time.perf_counter() - start, note


async def execute_all(todo, jobs, keep):
    """Run the (path, notebook) pairs, `jobs` at a time, calling keep(path, notebook, seconds)
    for each that succeeds; the paths of those that fail."""
    seats = asyncio.Semaphore(jobs)
    failed = []
    done = 0

    async def one(path, notebook):
        nonlocal done
        async with seats:
            try:
                seconds, note = await execute(path, notebook)
            except FAILURES as error:
                done += 1
                failed.append(path)
                print(f"[{done}/{len(todo)}] {path.stem} FAILED\n{error}", flush=True)
            else:
                done += 1
                keep(path, notebook, seconds)
                print(f"[{done}/{len(todo)}] {path.stem} {seconds:.0f} s{note}", flush=True)

    await asyncio.gather(*(one(path, notebook) for path, notebook in todo))
    return failed


def seats(requested):
    """As many kernels as asked for, but no more than the free memory has room for."""
    return max(1, min(requested, psutil.virtual_memory().available // MEMORY))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--cache", type=Path)
    how.add_argument("--inplace", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()

    cache = get_cache(str(options.cache)) if options.cache else None
    todo = []
    for path in options.files:
        notebook = read(path)
        if notebook is None:
            continue
        try:
            known = cache is not None and cache.match_cache_notebook(notebook)
        except KeyError:
            known = False
        if not known:
            todo.append((path.resolve(), notebook))

    def to_cache(path, notebook, seconds):
        bundle = CacheBundleIn(notebook, str(path), data={"execution_seconds": seconds})
        cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)

    def to_file(path, notebook, seconds):
        write_atomically(path, nbformat.writes(notebook, version=4))
        write_atomically(path, canonical_text(path))

    jobs = seats(options.jobs)
    print(f"{len(todo)} of {len(options.files)} pages with code to run, {jobs} at a time")
    failed = asyncio.run(execute_all(todo, jobs, to_cache if cache else to_file))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
