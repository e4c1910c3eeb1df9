"""The tables of docs/fast_unet.md, recomputed: the plain blocks step by step, and the fast blocks'
ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import SD_V2, res_blocks
from sd_perf.config import UNetConfig
from sd_perf.reference.unet import ResBlock, SpatialTransformer
from sd_perf.tools.estimate.eager import recorded
from sd_perf.tools.estimate.fused import cases, kernels_of
from sd_perf.tools.estimate.roofline import Kernel

PAGE = (Path(__file__).parents[3] / "docs/fast_unet.md").read_text(encoding="utf-8")
BATCH, C, SIDE = 64, SD_V2.widths[0], SD_V2.side


class Row(NamedTuple):
    """Bytes of a step: plain and fast, forward and forward + backward."""

    plain: tuple[float, float]
    fast: tuple[float, float]


class Steps:
    """Records the steps of a plain block one by one, each from what those before gave, cut off from
    them."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float]] = []

    def __call__(self, step: Callable[..., Any], *inputs: torch.Tensor) -> Any:
        outputs: list[Any] = []

        def forward() -> Any:
            outputs.append(step(*inputs))
            return outputs[0]

        self.rows.append(both_ways(recorded(forward)[0]))
        (made,) = outputs
        return tuple(map(leaf, made)) if isinstance(made, tuple) else leaf(made)


class Cut(torch.autograd.Function):
    """Takes a gradient as a layer before would, and keeps none: a leaf would copy it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> None:
        """Nothing goes further."""


def leaf(tensor: torch.Tensor) -> torch.Tensor:
    return Cut.apply(tensor.detach().requires_grad_())


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def both_ways(kernels: list[Kernel], share: float = 1.0) -> tuple[float, float]:
    forward = sum(kernel.bytes for kernel in kernels if not kernel.backward)
    return share * forward, share * sum(kernel.bytes for kernel in kernels)


def fast(*calls: tuple[str, str], share: float = 1.0) -> tuple[float, float]:
    """The ops' calls, each by the op and the name that its case has."""
    kernels = []
    for op, name in calls:
        (case,) = (case for case in cases(op, SD_V2, BATCH) if case.name == name)
        kernels += list(kernels_of(op, case))
    return both_ways(
        [Kernel(kernel.op, kernel.bytes, backward=kernel.backward) for kernel in kernels], share
    )


def share_of(name: str, columns: int) -> tuple[float, float]:
    """So many columns of a linear that is one for all blocks."""
    (case,) = (case for case in cases("linear", SD_V2, BATCH) if case.name.startswith(name))
    return fast(("linear", case.name), share=columns / case.shape["N"])


NOTHING = (0.0, 0.0)
NORMS = tuple(
    f"4096 tokens, 320{rest}"
    for rest in (
        ", bias of x",
        ", residual, bias of x",
        ", residual, bias of x and of later",
    )
)
"""cases of the three norms of a transformer block"""


def blocks() -> tuple[ResBlock, SpatialTransformer]:
    config = UNetConfig()
    with torch.device("meta"):
        block = ResBlock(C, C, 4 * C, config.resblock_groups)
        sizes = config.context_dim, config.num_head_channels, config.transformer_groups
        return block, SpatialTransformer(C, *sizes)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Image, time and text; the text comes from a frozen network, in float32."""
    image, time = leaf(meta(BATCH, C, SIDE, SIDE)), leaf(meta(BATCH, 4 * C))
    return image, time, meta(BATCH, SD_V2.context_length, SD_V2.context_width, dtype=torch.float32)


def res_block() -> list[Row]:
    block, (x, time, _), do = blocks()[0], inputs(), Steps()
    normal, x = do(lambda x: (block.in_layers[:2](x), x), x)
    h = do(block.in_layers[2], normal)
    h = do(lambda h, time: h + block.emb_layers(time)[:, :, None, None], h, time)
    h = do(block.out_layers[:2], h)
    h = do(block.out_layers[3], h)
    do(lambda x, h: block.skip_connection(x) + h, x, h)
    conv = fast(("conv", "64x64x320 to 320"))
    ours = [
        fast(("group_norm", "64x64x320 in 16, adds bias and residual, returns the sum twice")),
        conv,
        share_of("all time projections", C),
        fast(("group_norm", "64x64x320 in 16, adds shift")),
        conv,
        NOTHING,
    ]
    return [Row(*row) for row in zip(do.rows, ours, strict=True)]


def transformer() -> list[Row]:
    outer, (x, _, text) = blocks()[1], inputs()
    do, inner = Steps(), outer.transformer_blocks[0]
    own, cross, (widen, _, narrow) = inner.attn1, inner.attn2, inner.ff.net
    normal, x = do(lambda x: (outer.norm(x).flatten(2).transpose(1, 2), x), x)
    tokens = do(outer.proj_in, normal)
    normal, tokens = do(lambda x: (inner.norm1(x), x), tokens)
    q, k, v = do(lambda h: (own.to_q(h), own.to_k(h), own.to_v(h)), normal)
    h = do(lambda *qkv: attend(own, *qkv), q, k, v)
    h = do(own.to_out, h)
    normal, tokens = do(lambda x, h: added(inner.norm2, x, h), tokens, h)
    q = do(cross.to_q, normal)
    k, v = do(lambda text: (cross.to_k(text), cross.to_v(text)), text)
    h = do(lambda *qkv: attend(cross, *qkv), q, k, v)
    h = do(cross.to_out, h)
    normal, tokens = do(lambda x, h: added(inner.norm3, x, h), tokens, h)
    h = do(widen.proj, normal)
    h = do(geglu, h)
    h = do(narrow, h)
    tokens = do(lambda x, h: x + h, tokens, h)
    h = do(lambda tokens: outer.proj_out(tokens).transpose(1, 2).unflatten(2, (SIDE, SIDE)), tokens)
    do(lambda x, h: x + h, x, h)
    return [Row(*row) for row in zip(do.rows, transformer_ops(), strict=True)]


def attend(layer: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(*map(layer.heads, (q, k, v))).transpose(1, 2).flatten(2)


def added(norm: Any, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + h
    return norm(total), total


def geglu(h: torch.Tensor) -> torch.Tensor:
    value, gate = h.chunk(2, dim=-1)
    return value * F.gelu(gate)


def transformer_ops() -> Iterator[tuple[float, float]]:
    calls = list(cases("linear", SD_V2, BATCH))

    def linear(name: str) -> tuple[float, float]:
        (case,) = (case for case in calls if case.name.startswith(f"{name}, 4096 x"))
        return both_ways(list(kernels_of("linear", case)))

    norm, add, last = (fast(("layer_norm", name)) for name in NORMS)
    yield fast(("group_norm", "64x64x320 in 32, adds bias and residual, returns the sum"))
    yield linear("projection in")
    yield norm
    yield linear("self qkv")
    yield fast(("attention", "4096 tokens, 5 heads, self"))
    yield linear("attention out")
    yield add
    yield linear("cross q")
    yield share_of("keys and values of all texts", 2 * C)
    yield fast(("attention", "4096 tokens, 5 heads, cross"))
    yield linear("attention out")
    yield last
    yield linear("feed-forward in")
    yield fast(("geglu", "4096 tokens, 1280"))
    yield linear("feed-forward out")
    yield fast(("residual_add", "4096 tokens, 320"))
    yield linear("projection out")
    yield NOTHING


def whole(block: str) -> tuple[list[Kernel], float]:
    """The plain block recorded in one piece, and the bytes that it keeps for backward."""
    (x, time, text), (res, outer) = inputs(), blocks()
    return recorded((lambda: res(x, time)) if block == "ResBlock" else (lambda: outer(x, text)))


def kept(calls: dict[str, list[str]]) -> float:
    """Bytes that the fast ops keep, as `fused.saved_activations` counts them."""
    made = [
        (op, case)
        for op, names in calls.items()
        for case in cases(op, SD_V2, BATCH)
        if case.name in names
    ]
    return float(
        sum(
            all_ops()[op].saved_bytes(case, torch.bfloat16) * calls[op].count(case.name)  # type: ignore[misc]
            for op, case in made
        )
    )


def documented(title: str) -> list[list[str]]:
    """Numbers of the table under a title, without its head."""
    table = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip(" *") for cell in row[2:]] for row in rows[2:]]


KEPT = {
    "ResBlock": {
        "group_norm": [
            "64x64x320 in 16, adds bias and residual, returns the sum twice",
            "64x64x320 in 16, adds shift",
        ]
    },
    "Transformer block": {
        "group_norm": ["64x64x320 in 32, adds bias and residual, returns the sum"],
        "layer_norm": list(NORMS),
        "attention": ["4096 tokens, 5 heads, self", "4096 tokens, 5 heads, cross"],
        "geglu": ["4096 tokens, 1280"],
        "residual_add": ["4096 tokens, 320"],
    },
}


@pytest.mark.parametrize(
    ("title", "make"), [("ResBlock", res_block), ("Transformer block", transformer)]
)
def test_documented_bytes(title: str, make: Callable[[], list[Row]]) -> None:
    rows = make()
    total = Row(*(tuple(map(sum, zip(*way, strict=True))) for way in zip(*rows, strict=True)))  # type: ignore[arg-type]
    lines = [[*plain, *ours, plain[1] - ours[1]] for plain, ours in [*rows, total]]
    kernels, plain_keeps = whole(title)
    assert total.plain == pytest.approx(both_ways(kernels)), "the steps are all that the block does"
    ours_keeps = kept(KEPT[title])
    shown = [[f"{number / 1e9:.2f}" for number in line] for line in lines]
    keeps = [
        f"{number / 1e9:.2f}" for number in (plain_keeps, ours_keeps, plain_keeps - ours_keeps)
    ]
    expected = [*shown, [keeps[0], "", keeps[1], "", keeps[2]]]
    assert documented(title) == expected, "\n".join(map(" | ".join, expected))


def test_groups_that_straddle_two_sources() -> None:
    pairs = [block.sources for block in res_blocks(SD_V2) if len(block.sources) == 2]
    astride = {sum(pair) for pair in pairs if pair[0] % (sum(pair) // SD_V2.block_groups)}
    assert astride == {960, 1920}
    assert "960/16 and 1920/16" in PAGE
