"""The losses of open_clip, to compare with; its package cannot always be imported, one file can."""

import importlib.metadata
import importlib.util
from types import ModuleType

import pytest


def open_clip_loss() -> ModuleType:
    """open_clip/loss.py of the installed open_clip_torch, alone; skips where there is none.

    Importing open_clip itself takes torchvision, timm and more, which the losses do not need.
    """
    try:
        distribution = importlib.metadata.distribution("open_clip_torch")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs open_clip_torch")
    path = distribution.locate_file("open_clip/loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
