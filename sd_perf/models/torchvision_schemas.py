"""Makes PyPI's torchvision importable beside CPU-only torch.

That torchvision is built against CUDA torch, so its compiled extension does not load. torchvision
tolerates this, but then registers fake kernels for `torchvision::nms` and `torchvision::qnms`
(`torchvision/_meta_registrations.py`). torch refuses them, because the extension did not define
these operators, and the import fails. Defining the two operators first makes the import succeed,
and with it those of open_clip and diffusers, which never call them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

# Global, because the definitions live only as long as the object that made them.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def define_missing_torchvision_ops() -> None:
    """Define the operators that torchvision's extension should have defined but did not.

    Call it before the first import of torchvision, open_clip or diffusers. It does nothing where
    torchvision is not installed, is imported already, or has an extension that loads. Calling it
    again is harmless.
    """
    if "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    _load_extension(Path(spec.origin).parent)
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _LIBRARY.define(schema)


def _load_extension(folder: Path) -> None:
    """Load torchvision's extension as torchvision does, which tolerates an OSError too."""
    for suffix in EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            with contextlib.suppress(OSError):
                torch.ops.load_library(library)
            return
