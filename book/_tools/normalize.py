"""Write notebooks in one canonical form: `python book/_tools/normalize.py [--check] FILE...`

Kept: sources, tags, cell ids, and every text output, which the tests compare. Dropped: images
(the book draws them anew), timings, and what editors leave behind. Execution counts become 1..n.
A normal notebook comes out byte for byte as it went in, so a diff shows changed text only.

With --check nothing is written; the exit status is 1 when a file is not in canonical form.
"""

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

import nbformat

KEEP_NOTEBOOK = {"mystnb"}
KEEP_CELL = {"tags", "mystnb", "nbgrader", "slideshow"}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}


def is_image(mime):
    return mime.startswith("image/") or mime == "application/pdf"


def merge_streams(outputs):
    """Consecutive pieces of one stream are one text: how it was cut depends on the clock."""
    merged = []
    for output in outputs:
        last = merged[-1] if merged else None
        if last and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            merged.append(copy.deepcopy(output))
    return merged


def normalize(notebook):
    """The canonical form of a notebook, as a new object."""
    nb = copy.deepcopy(notebook)
    kept = {key: nb.metadata[key] for key in sorted(KEEP_NOTEBOOK & set(nb.metadata))}
    nb.metadata = nbformat.from_dict(
        {"kernelspec": KERNEL, "language_info": {"name": "python"}, **kept}
    )
    count = 0
    for cell in nb.cells:
        cell.metadata = nbformat.from_dict(
            {key: cell.metadata[key] for key in sorted(KEEP_CELL & set(cell.metadata))}
        )
        if not cell.metadata.get("tags", True):
            del cell.metadata["tags"]
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = merge_streams(cell.outputs)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
            if "data" in output:
                output.metadata = nbformat.from_dict({})
                for mime in [m for m in output.data if is_image(m)]:
                    del output.data[mime]
    return nb


def canonical_text(path):
    notebook = nbformat.read(path, as_version=4)
    return nbformat.writes(normalize(notebook), version=4, indent=1, ensure_ascii=False) + "\n"


def write_atomically(path, text):
    """The file is either the old one or the new one, also when we are stopped in between."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(name, path.stat().st_mode if path.exists() else 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    changed = []
    for path in options.files:
        text = canonical_text(path)
        if text != path.read_text(encoding="utf-8"):
            changed.append(path)
            if not options.check:
                write_atomically(path, text)
    for path in changed:
        print(f"{'not in canonical form' if options.check else 'normalized'}: {path}")
    return 1 if changed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
