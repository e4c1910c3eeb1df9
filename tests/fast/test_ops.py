from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sd_kernels.registry import all_ops
from sd_kernels.spec import Target
from sd_perf.config import Config
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Op, Ops, with_weights_cast


def test_every_op_folder_is_an_operator() -> None:
    ops = Ops.chosen(choose_kernels(Config(), Target.here()))
    assert vars(ops).keys() == all_ops().keys()


def test_a_missing_operator_names_the_folder_that_would_make_it() -> None:
    with pytest.raises(AttributeError, match="'tanh' was chosen; a folder kernels/sd_kernels/tanh"):
        _ = Ops({}).tanh
    assert vars(copy.deepcopy(Ops({"conv": max}))) == {"conv": max}


def test_wrapping_is_asked_once_for_each_operator() -> None:
    asked: list[str] = []

    def wrap(name: str, op: Op) -> Op:
        asked.append(name)
        return lambda *args: (name, op(*args))

    ops = Ops({"a": max, "b": min}).wrapped(wrap)
    assert asked == ["a", "b"] and ops.a(1, 2) == ("a", 2) and ops.b(1, 2) == ("b", 1)


def test_weights_are_cast_to_the_first_tensor_but_before_merging() -> None:
    def dtypes(*tensors: Any, scale: float = 1.0) -> list[Any]:
        return [tensor if tensor is None else tensor.dtype for tensor in tensors]

    ops = with_weights_cast(Ops({"conv": dtypes, "upsample_conv": dtypes}))
    x, weight = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert ops.conv(x, weight, None, scale=2.0) == [torch.bfloat16, torch.bfloat16, None]
    assert ops.upsample_conv(x, weight) == [torch.bfloat16, torch.float32]
