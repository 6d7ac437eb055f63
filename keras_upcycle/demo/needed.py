"""Packages that a demo needs and the rest of the package does not."""

import importlib.util
from collections.abc import Mapping

# Module: the package that has it.
ALWAYS = {"matplotlib": "matplotlib", "rich": "rich"}


def check(packages: Mapping[str, str]) -> None:
    """Raises `ImportError` if one is missing.

    Args:
        packages: From module to package.
    """
    missing = [
        package
        for module, package in packages.items()
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        raise ImportError(
            f"The demo needs {', '.join(missing)}. Install with `pip install "
            f"{' '.join(missing)}`, or this package with its extra `[demo]`."
        )
