"""Lets torchvision be imported beside a torch that its compiled extension was not built for.

PyPI's torchvision is built against CUDA torch. Beside CPU-only torch its extension does not load,
which torchvision forgives; but it then registers fake kernels for `torchvision::nms` and
`torchvision::qnms` (`torchvision/_meta_registrations.py`), which torch refuses because the
extension did not define them. With the two names defined, the import succeeds, and with it those of
open_clip and diffusers, which never call them.
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

# Definitions live as long as the library object that made them.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")


def define_missing_torchvision_ops() -> None:
    """Call before the first import of torchvision, open_clip or diffusers.

    Does nothing where torchvision is not installed, is imported already, or has an extension that
    loads: the extension is tried first, and what it defines is left alone. Calling it again is
    harmless.
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
    """Loads torchvision's operators as torchvision itself is about to; loading them twice is the
    same as once."""
    for suffix in EXTENSION_SUFFIXES:
        library = folder / f"_C{suffix}"
        if library.exists():
            with contextlib.suppress(OSError):
                torch.ops.load_library(library)
            return
