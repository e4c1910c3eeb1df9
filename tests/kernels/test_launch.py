"""Every launch of every op at full size, recorded: what the GPU's limits must hold."""

from __future__ import annotations

import pytest
import torch

from sd_kernels.launch import Launch, recording
from sd_kernels.registry import all_ops
from sd_kernels.spec import Inputs, OpSpec

WITH_KERNELS = [spec for spec in all_ops().values() if spec.ours and spec.name != "upsample_conv"]
"""`upsample_conv` has torch's convolution between its kernels; its grids are as those of `geglu`"""
AXIS = 65_535
"""programs along the second and third axis of a grid (CUDA programming guide, technical
specifications); the first may have 2^31 - 1"""
RECORDED, LARGEST = 2, 512
"""samples of the recorded launches, and those that must still fit"""


def launches(spec: OpSpec) -> list[Launch]:
    recorded: list[Launch] = []
    function = spec.backend(spec.ours or "").function(spec.name)
    for case in spec.cases:
        sized = case.at_batch(RECORDED) if "B" in case.shape else case
        # In float32, where the op takes it, the interpreter copies no output.
        dtype = torch.float32 if torch.float32 in spec.dtypes else spec.dtypes[0]
        inputs = spec.inputs(sized, Inputs(sized, dtype, empty=True))
        leaves = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        with recording() as made:
            results = function(**inputs)
            outputs = results if isinstance(results, tuple) else (results,)
            outputs = tuple(y for y in outputs if y.requires_grad)
            if outputs and leaves:
                grads = [torch.empty_like(y) for y in outputs]
                torch.autograd.grad(outputs, leaves, grads, allow_unused=True)
        recorded += made
    return recorded


@pytest.mark.parametrize("spec", WITH_KERNELS, ids=lambda spec: spec.name)
def test_grids_fit_at_the_largest_batch(spec: OpSpec) -> None:
    made = launches(spec)
    assert made
    for each in made:
        # A batch grows a grid in proportion at most.
        rest = [axis * LARGEST // RECORDED for axis in each.grid[1:]]
        assert all(axis <= AXIS for axis in rest), (each.kernel.__name__, each.grid)
