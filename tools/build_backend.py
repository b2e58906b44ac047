"""PEP 517 backend: setuptools', plus one decision, which torch to compile against.

pip builds in an isolated environment that hides the user's torch. `torch` in build-system.requires
would download another one, of several GB, into a throw-away folder; leaving it out would make
setup.py fail. So: a torch in the environment that runs pip is shown to the build, and only where
there is none is one requested. With --no-build-isolation this file only forwards.
"""

import os
import site
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not overridden below

TORCH = "torch>=2.11,<2.14"  # as in pyproject.toml's dependencies


def _outer_site_packages() -> Iterator[str]:
    # pip keeps sys.executable; `python -m build` makes a new environment, but leaves the variables.
    yield sysconfig.get_path("purelib")
    yield sysconfig.get_path("platlib")
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):
        if prefix := os.environ.get(variable):
            paths = {"base": prefix, "platbase": prefix, "installed_base": prefix}
            yield sysconfig.get_path("purelib", vars=paths)
    yield site.getusersitepackages()
    yield from site.getsitepackages()


def _show_torch() -> bool:
    if PathFinder.find_spec("torch") is not None:
        return True
    for folder in _outer_site_packages():
        if PathFinder.find_spec("torch", [folder]) is not None:
            sys.path.append(folder)  # last: the isolated setuptools and ninja still win
            return True
    return False


def _with_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _show_torch()
        return hook(*args, **kwargs)

    return wrapped


def _asking_for_torch(hook: Callable[..., list[str]]) -> Callable[..., list[str]]:
    def wrapped(config_settings: Any = None) -> list[str]:
        return hook(config_settings) + ([] if _show_torch() else [TORCH])

    return wrapped


get_requires_for_build_wheel = _asking_for_torch(build_meta.get_requires_for_build_wheel)
get_requires_for_build_editable = _asking_for_torch(build_meta.get_requires_for_build_editable)
build_wheel = _with_torch(build_meta.build_wheel)
build_editable = _with_torch(build_meta.build_editable)
