"""Importing torchvision beside CPU-only torch, in a process of its own."""

import importlib.util
import subprocess
import sys

import pytest

IMPORTS = """
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
define_missing_torchvision_ops()
define_missing_torchvision_ops()
import torchvision, open_clip
from diffusers import UNet2DConditionModel
define_missing_torchvision_ops()
"""

WORKING = """
import sys, types, torch
from importlib.machinery import ModuleSpec
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl(name, lambda dets, scores, iou_threshold: scores, "CPU")
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
define_missing_torchvision_ops()
scores = torch.ones(1)
assert torch.ops.torchvision.nms(scores, scores, 0.5) is scores
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [IMPORTS, WORKING], ids=["import", "working"])
def test_torchvision_schemas(program):
    for package in ("torchvision", "open_clip", "diffusers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
