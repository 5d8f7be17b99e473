"""Every chapter is built as the book promises, and each check has been seen to say no.

A check takes a notebook and returns what is wrong with it, in words; an empty list is a pass.
"""

import ast
import copy
import re
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
STATEMENTS = {"theorem": "thm", "proposition": "prop", "lemma": "lem", "corollary": "cor"}
KINDS = ("Check", "Prove", "Extend", "Break")
CHECKS = {}


def check(function):
    CHECKS[function.__name__] = function
    return function


class Directive(NamedTuple):
    name: str
    title: str
    options: dict


DIRECTIVE = re.compile(
    r"^ *(?:`{3,}|:{3,})\{(?P<name>[\w:-]+)\}(?P<title>[^\n]*)\n"
    r"(?P<options>(?: *:[\w-]+:[^\n]*\n)*)",
    re.MULTILINE,
)
OPTION = re.compile(r":([\w-]+):[ ]*([^\n]*)")


def prose(notebook):
    return "\n\n".join(
        cell.source + "\n" for cell in notebook.cells if cell.cell_type == "markdown"
    )


def directives(notebook, *names):
    """The directives of these names, in order of appearance."""
    return [
        Directive(m["name"], m["title"].strip(), dict(OPTION.findall(m["options"])))
        for m in DIRECTIVE.finditer(prose(notebook))
        if m["name"] in names
    ]


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def claims(cell):
    """How many times a cell calls `claim`, however it is imported."""
    calls = (node.func for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call))
    return sum((getattr(f, "id", None) or getattr(f, "attr", None)) == "claim" for f in calls)


def tags(cell):
    return cell.metadata.get("tags", [])


def statements(notebook):
    return directives(notebook, *(f"prf:{name}" for name in STATEMENTS))


def labels(notebook):
    return [d.options.get("label", "") for d in statements(notebook)]


# --- the checks of one notebook --------------------------------------------------------------


@check
def the_title_has_a_label_and_no_number(notebook):
    first = notebook.cells[0]
    if first.cell_type != "markdown":
        return ["the first cell is not text"]
    if not re.match(r"\(ch-[\w-]+\)=\n+# [^\d\n]+", first.source):
        return ["the page does not start with (ch-...)= and a title without a number"]
    return []


@check
def every_statement_is_labeled_and_proved(notebook):
    wanted = {f"prf:{name}": short for name, short in STATEMENTS.items()}
    blocks = directives(notebook, "prf:proof", *wanted)
    wrong = []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block.name == "prf:proof":
            continue
        label = block.options.get("label", "")
        if not label.startswith(f"{wanted[block.name]}-"):
            wrong.append(f"{block.name} {block.title!r} has label {label!r}")
        if following is None or following.name != "prf:proof":
            wrong.append(f"{label} is not followed by its proof")
    if not any(block.name in ("prf:theorem", "prf:proposition") for block in blocks):
        wrong.append("no theorem or proposition")
    return wrong


@check
def five_claims_of_three_kinds(notebook):
    total = sum(map(claims, code(notebook)))
    wrong = [] if total >= 5 else [f"{total} claims, not five"]
    for kind in ("identity", "comparison", "control"):
        if not any(kind in tags(cell) and claims(cell) for cell in code(notebook)):
            wrong.append(f"no cell with a claim is tagged {kind!r}")
    return wrong


@check
def every_cell_ran_once_in_order_and_in_silence(notebook):
    wrong = []
    counts = [cell.execution_count for cell in code(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        wrong.append(f"execution counts are {counts}")
    for number, cell in enumerate(code(notebook), 1):
        for output in cell.outputs:
            if output.output_type == "error":
                wrong.append(f"code cell {number} ends in {output.ename}")
            if output.get("name") == "stderr":
                wrong.append(f"code cell {number} writes to stderr: {output.text[:60]!r}")
    return wrong


@check
def cells_are_short(notebook):
    lengths = [len(re.findall(r"^.*\S", cell.source, re.MULTILINE)) for cell in code(notebook)]
    wrong = [f"code cell {n} has {k} lines" for n, k in enumerate(lengths, 1) if k > 20]
    if statistics.median(lengths) > 6:
        wrong.append(f"the median cell has {statistics.median(lengths)} lines")
    for number, cell in enumerate(code(notebook), 1):
        widest = max(map(len, cell.source.splitlines()), default=0)
        if widest > 79:
            wrong.append(f"code cell {number} is {widest} columns wide")
    return wrong


@check
def exercises_are_of_four_kinds_and_half_are_solved(notebook):
    exercises = directives(notebook, "exercise")
    kinds = [e.title.split(":")[0] for e in exercises]
    wrong = [f"{len(exercises)} exercises, not six"] * (len(exercises) < 6)
    wrong += [f"no exercise of the kind {kind!r}" for kind in KINDS if kind not in kinds]
    wrong += [f"exercise {e.title!r} names no kind" for e in exercises if _kind(e) not in KINDS]
    known = {e.options.get("label") for e in exercises}
    folded = set()
    for solution in directives(notebook, "solution"):
        if solution.title not in known:
            wrong.append(f"a solution of {solution.title!r}, which is no exercise here")
        elif "dropdown" not in solution.options.get("class", ""):
            wrong.append(f"the solution of {solution.title} is not folded")
        else:
            folded.add(solution.title)
    if 2 * len(folded) < len(exercises):
        wrong.append(f"{len(folded)} of {len(exercises)} exercises have a folded solution")
    return wrong


def _kind(exercise):
    return exercise.title.split(":")[0] if ":" in exercise.title else None


@check
def figures_are_described_captioned_and_referred_to(notebook):
    wrong, text = [], prose(notebook)
    for number, cell in enumerate(code(notebook), 1):
        settings = cell.metadata.get("mystnb", {})
        drawn = any(
            "<Figure size" in output.get("data", {}).get("text/plain", "")
            or any(mime.startswith("image/") for mime in output.get("data", {}))
            for output in cell.outputs
        )
        if not drawn and "figure" not in settings:
            continue
        if sum("data" in output for output in cell.outputs) != 1:
            wrong.append(f"code cell {number} shows more than its figure: end it without a value")
        name = settings.get("figure", {}).get("name", "")
        if not name.startswith("fig-"):
            wrong.append(f"code cell {number}: the figure's name is {name!r}")
        elif not re.search(rf"\{{numref\}}`[^`]*\b{re.escape(name)}\b[^`]*`", text):
            wrong.append(f"code cell {number}: no text refers to {name}")
        if len(settings.get("figure", {}).get("caption", "")) < 10:
            wrong.append(f"code cell {number}: {name} has no caption")
        if len(settings.get("image", {}).get("alt", "")) < 40:
            wrong.append(f"code cell {number}: {name} has no text of 40 letters in its place")
    return wrong


@check
def a_popular_claim_is_tested(notebook):
    boxes = directives(notebook, "admonition")
    found = any("popular-claim" in box.options.get("class", "") for box in boxes)
    return [] if found else ["no box tests a popular claim"]


@check
def it_starts_with_a_seed_and_ends_with_its_cost(notebook):
    first, last = code(notebook)[0], code(notebook)[-1]
    wrong = []
    if not re.search(r"^SEED = \d+$", first.source, re.MULTILINE):
        wrong.append("the first code cell sets no SEED")
    if "show.style()" not in first.source:
        wrong.append("the first code cell does not call show.style()")
    if last.source.strip() != "show.cost()":
        wrong.append("the last code cell is not show.cost()")
    if "nbval-ignore-output" not in tags(last):
        wrong.append("the last code cell's output, a time, would be compared")
    return wrong


@check
def it_is_in_canonical_form(notebook):
    return [] if normalize(notebook) == notebook else ["run book/_tools/normalize.py on it"]


def normalize(notebook):
    sys.path.insert(0, str(ROOT / "book" / "_tools"))
    try:
        import normalize as tool
    finally:
        sys.path.pop(0)
    return tool.normalize(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", CHECKS)
def test_chapter(name, path):
    assert CHECKS[name](nbformat.read(path, as_version=4)) == []


# --- every statement has a test, and every theorem a false variant that is rejected ----------


def marked(source):
    """Labels that test functions carry, as {"theorem": {...}, "false_variant": {...}}."""
    found = {"theorem": set(), "false_variant": set()}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
            continue
        for mark in node.decorator_list:
            if (
                isinstance(mark, ast.Call)
                and isinstance(mark.func, ast.Attribute)
                and mark.func.attr in found
            ):
                found[mark.func.attr] |= {a.value for a in mark.args if isinstance(a, ast.Constant)}
    return found


def unchecked(labels, sources):
    """What the tests in `sources` leave unsaid about the statements with these labels."""
    marks = [marked(source) for source in sources]
    cited = set().union(*(m["theorem"] for m in marks))
    rejected = set().union(*(m["false_variant"] for m in marks))
    wrong = [f"no test is marked theorem({label!r})" for label in labels if label not in cited]
    wrong += [
        f"no test is marked false_variant({label!r})"
        for label in labels
        if label.startswith("thm-") and label not in rejected
    ]
    wrong += [
        f"a test is marked {label!r}, which no chapter states"
        for label in sorted((cited | rejected) - set(labels))
    ]
    return wrong


def test_every_statement_is_checked_and_every_theorem_can_fail():
    every = [label for path in NOTEBOOKS for label in labels(nbformat.read(path, as_version=4))]
    sources = [path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))]
    assert unchecked(every, sources) == []


def test_labels_are_unique_in_the_book():
    every = [
        label
        for path in NOTEBOOKS
        for label in re.findall(
            r"^ *:label: *(\S+)|^\((\S+)\)=|\$\$ *\((\S+)\)",
            prose(nbformat.read(path, as_version=4)),
            re.MULTILINE,
        )
    ]
    every = ["".join(groups) for groups in every]
    assert sorted(every) == sorted(set(every))


# --- the pages around the chapters -----------------------------------------------------------


def test_the_contents_list_exactly_the_chapters_that_exist():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [entry["file"] for part in contents["parts"] for entry in part["chapters"]]
    chapters = [file for file in listed if file.startswith("notebooks/")]
    assert chapters == [f"notebooks/{path.stem}" for path in NOTEBOOKS]
    pages = [file for file in listed if not file.startswith("notebooks/")]
    assert all((ROOT / f"{page}.md").exists() for page in pages)


def test_the_map_on_the_cover_links_every_chapter_that_exists():
    cover = (ROOT / "book" / "index.md").read_text()
    for path in NOTEBOOKS:
        label = re.match(r"\((ch-[\w-]+)\)=", nbformat.read(path, as_version=4).cells[0].source)[1]
        number = int(path.stem[:2])
        assert f"{{numref}}`{{number}}. {{name}} <{label}>`" in cover
        assert f"[{number}. " not in cover, f"chapter {number} exists but is called planned"


def test_the_map_on_the_cover_names_all_22_chapters_in_order():
    cover = (ROOT / "book" / "index.md").read_text()
    items = re.findall(r"^- (?:\[(\d+)\. [^\]]+\]\{\.planned\}|(\{numref\}))", cover, re.MULTILINE)
    assert len(items) == 22
    assert all(int(number or place) == place for place, (number, _) in enumerate(items, 1))


def unmatched(bibliography, texts):
    """Sources that are listed twice, listed but not cited, or cited but not listed."""
    listed = re.findall(r"^@\w+\{([^,\s]+),", bibliography, re.MULTILINE)
    groups = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", "\n".join(texts))
    cited = {key.strip() for group in groups for key in group.split(",")}
    return (
        [f"{key} is listed twice" for key in sorted({k for k in listed if listed.count(k) > 1})]
        + [f"{key} is listed but not cited" for key in sorted(set(listed) - cited)]
        + [f"{key} is cited but not listed" for key in sorted(cited - set(listed))]
    )


def test_the_bibliography_lists_exactly_the_works_that_are_cited():
    texts = [prose(nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
    texts += [path.read_text() for path in sorted((ROOT / "book").glob("*.md"))]
    assert unmatched((ROOT / "book" / "references.bib").read_text(), texts) == []


# --- the checks can fail ----------------------------------------------------------------------


def sound():
    """A chapter in miniature that passes every check."""
    text = "\n\n".join(
        [
            "```{prf:theorem} Sums\n:label: thm-sums\nTrue.\n```",
            "```{prf:proof}\nBy counting.\n```",
            "See {numref}`fig-line`.",
            ":::{admonition} A popular claim, tested\n:class: popular-claim\nNo.\n:::",
            *(
                f"```{{exercise}} {kind}: something\n:label: ex-{n}\nDo.\n```"
                for n, kind in enumerate(["Check", "Prove", "Extend", "Break", "Check", "Break"])
            ),
            *(
                f"```{{solution}} ex-{n}\n:label: sol-{n}\n:class: dropdown\nSo.\n```"
                for n in range(3)
            ),
        ]
    )
    drawing = {
        "mystnb": {
            "image": {"alt": "A straight line that rises from left to right."},
            "figure": {"name": "fig-line", "caption": "A straight line."},
        }
    }
    kinds = ["identity", "comparison", "control", "identity", "identity"]
    notebook = new_notebook(
        cells=[
            new_markdown_cell("(ch-small)=\n# A small chapter\n"),
            new_code_cell("from compresskit import show\nSEED = 0\nshow.style()"),
            new_markdown_cell(text),
            *(new_code_cell("show.claim('x', x)", metadata={"tags": [kind]}) for kind in kinds),
            new_code_cell("draw()", metadata=drawing, outputs=[FIGURE]),
            new_code_cell("show.cost()", metadata={"tags": ["nbval-ignore-output"]}),
        ]
    )
    return normalize(notebook)


def edit(old, new):
    """A flaw: `old` becomes `new` wherever it stands."""

    def flaw(notebook):
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)

    flaw.__name__ = f"{old!r} -> {new!r}"
    return flaw


def change(index, **fields):
    """A flaw: code cell `index` has other fields."""

    def flaw(notebook):
        code(notebook)[index].update(nbformat.from_dict(fields))

    flaw.__name__ = f"cell {index}: {', '.join(fields)}"
    return flaw


STDERR = new_output("stream", name="stderr", text="UserWarning: something")
ERROR = new_output("error", ename="ValueError", evalue="no", traceback=[])
FIGURE = new_output("display_data", {"text/plain": "<Figure size 500x300 with 1 Axes>"})
VALUE = new_output("execute_result", {"text/plain": "(0.0, 1.0)"})
IMAGE = new_output("display_data", {"text/plain": "x", "image/png": "AAAA"})
FLAWS = [
    ("the_title_has_a_label_and_no_number", edit("(ch-small)=\n", "")),
    ("the_title_has_a_label_and_no_number", edit("# A small", "# 7. A small")),
    ("every_statement_is_labeled_and_proved", edit("{prf:proof}", "{prf:remark}")),
    ("every_statement_is_labeled_and_proved", edit("thm-sums", "sums")),
    ("every_statement_is_labeled_and_proved", edit("{prf:theorem}", "{prf:definition}")),
    ("five_claims_of_three_kinds", change(1, source="x")),
    ("five_claims_of_three_kinds", change(3, metadata={})),
    ("five_claims_of_three_kinds", edit("show.claim('x', x)", "print('claim(x)')")),
    ("every_cell_ran_once_in_order_and_in_silence", change(2, execution_count=None)),
    ("every_cell_ran_once_in_order_and_in_silence", change(2, execution_count=9)),
    ("every_cell_ran_once_in_order_and_in_silence", change(2, outputs=[STDERR])),
    ("every_cell_ran_once_in_order_and_in_silence", change(2, outputs=[ERROR])),
    ("cells_are_short", change(2, source="\n".join(["x"] * 21))),
    ("cells_are_short", change(2, source="x" * 80)),
    ("cells_are_short", edit("show.claim('x', x)", "\n".join(["x"] * 7))),
    ("exercises_are_of_four_kinds_and_half_are_solved", edit("Prove: ", "Check: ")),
    ("exercises_are_of_four_kinds_and_half_are_solved", edit("Break: something", "Break it")),
    ("exercises_are_of_four_kinds_and_half_are_solved", edit("{solution} ex-2", "{note} ex-2")),
    ("exercises_are_of_four_kinds_and_half_are_solved", edit("{solution} ex-2", "{solution} ex-x")),
    ("exercises_are_of_four_kinds_and_half_are_solved", edit(":class: dropdown\n", "")),
    ("figures_are_described_captioned_and_referred_to", change(6, metadata={})),
    ("figures_are_described_captioned_and_referred_to", edit("`fig-line`", "`fig-other`")),
    ("figures_are_described_captioned_and_referred_to", change(2, outputs=[IMAGE])),
    ("figures_are_described_captioned_and_referred_to", change(6, outputs=[FIGURE, VALUE])),
    ("a_popular_claim_is_tested", edit(":class: popular-claim\n", "")),
    ("it_starts_with_a_seed_and_ends_with_its_cost", edit("SEED = 0", "seed = 0")),
    ("it_starts_with_a_seed_and_ends_with_its_cost", edit("show.style()", "pass")),
    ("it_starts_with_a_seed_and_ends_with_its_cost", edit("show.cost()", "pass")),
    ("it_starts_with_a_seed_and_ends_with_its_cost", change(7, metadata={})),
    ("it_is_in_canonical_form", change(2, metadata={"collapsed": True})),
    ("it_is_in_canonical_form", change(2, outputs=[IMAGE])),
]


@pytest.mark.parametrize("name", CHECKS)
def test_a_sound_chapter_passes(name):
    assert CHECKS[name](sound()) == []


@pytest.mark.parametrize(("name", "flaw"), FLAWS, ids=lambda x: getattr(x, "__name__", x))
def test_a_flaw_is_noticed(name, flaw):
    broken = copy.deepcopy(sound())
    flaw(broken)
    assert broken != sound()
    assert CHECKS[name](broken)


def test_every_check_has_been_seen_to_fail():
    assert {name for name, _ in FLAWS} == set(CHECKS)


def test_a_statement_without_its_tests_is_noticed():
    test = "@pytest.mark.theorem('thm-a')\ndef test_a(): ...\n"
    twin = "@pytest.mark.false_variant('thm-a')\ndef test_not_a(): ...\n"
    assert unchecked(["thm-a"], [test + twin]) == []
    assert unchecked(["thm-a"], [test]) == ["no test is marked false_variant('thm-a')"]
    assert unchecked(["thm-a"], [twin]) == ["no test is marked theorem('thm-a')"]
    assert unchecked(["lem-a"], [""]) == ["no test is marked theorem('lem-a')"]
    assert unchecked([], [test]) == ["a test is marked 'thm-a', which no chapter states"]
    assert unchecked(["thm-a"], ["# pytest.mark.theorem('thm-a')"]) != []


def test_a_source_that_is_not_matched_is_noticed():
    one, two = "@book{a2001one,\n}\n", "@misc{b2002two,\n}\n"
    text = "As {cite}`a2001one` and {cite:t}`b2002two, a2001one` say."
    assert unmatched(one + two, [text]) == []
    assert unmatched(one + two + one, [text]) == ["a2001one is listed twice"]
    assert unmatched(one + two, ["{cite}`b2002two`"]) == ["a2001one is listed but not cited"]
    assert unmatched(one, [text]) == ["b2002two is cited but not listed"]
