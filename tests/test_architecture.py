"""The order of the modules, and what every public name owes its reader."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest

import compresskit

PACKAGE = Path(compresskit.__file__).parent
# Each module imports from strictly lower lines only.
LINES = [
    {"bits", "files", "theory", "data"},
    {"code", "linalg"},
    {"entropy"},
    {"affine", "codebook", "lowrank", "sparse", "losses", "formats"},
    {"basis", "integer", "models"},
    {"stats"},
    {"methods", "allocate"},
    {"layers"},
    {"model"},
    {"container", "measure"},
    {"train", "surgery"},
    {"recipes"},
    {"show"},
]
LINE = {name: number for number, names in enumerate(LINES) for name in names}
FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


def home(path: Path) -> str:
    """The module, or the sub-package, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The compresskit modules that a source text imports, at any depth of the text."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("compresskit.")}
    return found


def points_down(name: str, source: str) -> bool:
    inside = {name}  # files of one sub-package may import each other
    return all(LINE[other] < LINE[name] for other in imported(source) - inside)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    assert points_down(home(path), path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "from compresskit.model import layers",
        "import compresskit.show",
        "from compresskit import measure",
    ],
)
def test_an_import_that_points_up_is_noticed(line):
    assert not points_down("code", f"def f():\n    {line}")


def test_nothing_imports_show():
    assert not any("show" in imported(path.read_text()) for path in FILES)


def test_only_layers_asks_for_kinds_of_modules():
    asking = {
        home(path)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", "") == "isinstance"
        and "nn." in ast.unparse(node.args[1])
    }
    assert asking == {"layers"}


def public():
    for path in sorted(FILES):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = importlib.import_module(
            ".".join(["compresskit", *parts]).removesuffix(".__init__")
        )
        for name, value in vars(module).items():
            mine = getattr(value, "__module__", None) == module.__name__
            if (
                mine
                and not name.startswith("_")
                and (inspect.isfunction(value) or inspect.isclass(value))
            ):
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("value", list(public()))
def test_every_public_name_is_documented(value):
    assert (value.__doc__ or "").strip()
    if inspect.isfunction(value):
        parameters = inspect.signature(value).parameters.values()
        if "Parameters\n" in value.__doc__:
            silent = [
                p.name
                for p in parameters
                if not re.search(rf"^ *(\w+, )*{p.name}(, \w+)* :", value.__doc__, re.MULTILINE)
            ]
            assert not silent, "arguments that the docstring does not describe"
        assert not any(p.kind is p.VAR_KEYWORD for p in parameters), "no **kwargs"
        assert not any(isinstance(p.default, list | dict | set) for p in parameters)


def test_the_package_does_not_print():
    printing = [
        path.name
        for path in FILES
        if home(path) != "show"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert not printing
