from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sd_kernels.errors import KernelError
from sd_kernels.packing import TEXT_KEYS_VALUES, TIME_BIASES, TIME_WEIGHTS, Packing
from sd_perf.config import UNetConfig
from sd_perf.reference.unet import UNet
from tests.kernels.faults import replaced

ALL = (TEXT_KEYS_VALUES, TIME_WEIGHTS, TIME_BIASES)
SMALL = UNetConfig(model_channels=32, num_head_channels=16, context_dim=24)
"""the benchmark's layout: 16 cross-attentions, 22 residual blocks"""


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value, dtype=torch.float64) for name, value in UNet(SMALL).state_dict().items()}


def test_the_benchmark_s_unet_packs_as_its_sizes_say() -> None:
    with torch.device("meta"):
        state_dict = UNet(UNetConfig()).state_dict()
    packings = [Packing.of(state_dict, endings) for endings in ALL]
    shapes = [tuple(packing.pack(state_dict).shape) for packing in packings]
    assert shapes == [(24_960, 1024), (20_160, 1280), (20_160,)]
    assert [len(packing.names) for packing in packings] == [32, 22, 22]
    assert packings[0].names[:2] == tuple(
        f"input_blocks.1.1.transformer_blocks.0.attn2.to_{letter}.weight" for letter in "kv"
    )


def test_a_whole_unet_and_its_moments_come_back_as_they_were(weights: dict[str, torch.Tensor]) -> None:
    packings = [Packing.of(weights, endings) for endings in ALL]
    packed_names = {name for packing in packings for name in packing.names}
    moments = [{name: torch.rand_like(value) for name, value in weights.items()} for _ in range(2)]
    for state in (weights, *moments):
        back = {name: value for name, value in state.items() if name not in packed_names}
        for packing in packings:
            back |= packing.unpack(packing.pack(state))
        assert back.keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(back[name], value), name


def product_and_gradients(weights: dict[str, torch.Tensor], packed: bool) -> Iterator[torch.Tensor]:
    """Of keys and values, then of time projections: outputs, gradients of weights, biases and input."""
    for endings in (TEXT_KEYS_VALUES, TIME_WEIGHTS):
        packing = Packing.of(weights, endings)
        torch.manual_seed(1)
        x = torch.randn(3, 7, weights[packing.names[0]].shape[1], dtype=torch.float64, requires_grad=True)
        biases = Packing.of(weights, TIME_BIASES) if endings is TIME_WEIGHTS else None
        if packed:
            leaves = [packing.pack(weights).requires_grad_()]
            leaves += [biases.pack(weights).requires_grad_()] if biases else []
            outputs = list(packing.split(F.linear(x, *leaves)).values())
        else:
            leaves = [weights[name].clone().requires_grad_() for name in packing.names]
            leaves += [weights[name].clone().requires_grad_() for name in biases.names] if biases else []
            pairs = zip(leaves, leaves[len(packing.names) :] or [None] * len(leaves), strict=False)
            outputs = [F.linear(x, weight, bias) for weight, bias in pairs]
        yield from outputs
        *grads, dx = torch.autograd.grad(sum((y.cos() * i).sum() for i, y in enumerate(outputs)), [*leaves, x])
        if packed:
            grads = [part for kind, grad in zip((packing, biases), grads, strict=False) if kind
                     for part in kind.unpack(grad).values()]  # fmt: skip
        yield from [*grads, dx]


def test_packed_products_and_gradients_are_the_separate_ones(weights: dict[str, torch.Tensor]) -> None:
    pairs = list(zip(*(product_and_gradients(weights, packed) for packed in (True, False)), strict=True))
    assert len(pairs) == 2 * 32 + 1 + 3 * 22 + 1
    for ours, separate in pairs:
        torch.testing.assert_close(ours, separate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "fault",
    [
        ("in dict.fromkeys(found) for end in endings", "in dict.fromkeys(found) for end in endings[::-1]"),
        ("torch.cat(tensors)", "torch.cat(tensors[::-1])"),
        ("y.split(self.sizes, dim=-1)", "y.split(self.sizes[::-1], dim=-1)[::-1]"),
    ],
    ids=["values before keys", "packed backwards", "split backwards"],
)  # fmt: skip
def test_planted_faults_are_red(fault: tuple[str, str], weights: dict[str, torch.Tensor]) -> None:
    with replaced("sd_kernels.packing", fault) as module:
        packing = module.Packing.of(weights, TEXT_KEYS_VALUES)
        in_order = packing.names == Packing.of(weights, TEXT_KEYS_VALUES).names
        x = torch.ones(1, SMALL.context_dim, dtype=torch.float64)
        columns = packing.split(F.linear(x, packing.pack(weights)))
        right = (
            columns[name].shape[-1] == len(weights[name]) and torch.allclose(columns[name], F.linear(x, weights[name]))
            for name in packing.names
        )
        assert not (in_order and all(right))


def test_attention_reads_a_block_s_columns_where_they_are(weights: dict[str, torch.Tensor]) -> None:
    packing = Packing.of(weights, TEXT_KEYS_VALUES)
    whole = F.linear(torch.randn(2, 5, SMALL.context_dim, dtype=torch.float64), packing.pack(weights))
    key, value = (packing.split(whole)[name] for name in packing.names[6:8])
    heads = [column.unflatten(2, (-1, SMALL.num_head_channels)).transpose(1, 2) for column in (key, value)]
    for view, offset in zip(heads, (sum(packing.sizes[:6]), sum(packing.sizes[:7])), strict=True):
        assert view.data_ptr() == whole.data_ptr() + offset * whole.element_size()
        assert view.stride()[2:] == (sum(packing.sizes), 1)
    query = torch.randn(2, heads[0].shape[1], 4, SMALL.num_head_channels, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(query, *(view.contiguous() for view in heads))
    torch.testing.assert_close(F.scaled_dot_product_attention(query, *heads), expected)


def test_columns_of_the_benchmark_are_aligned_for_attention_kernels() -> None:
    """16 bytes for FlashAttention and cuDNN, also from row to row; 128 for whole cache lines."""
    with torch.device("meta"):
        packing = Packing.of(UNet(UNetConfig()).state_dict(), TEXT_KEYS_VALUES)
    starts = [sum(packing.sizes[:i]) for i in range(len(packing.sizes) + 1)]
    assert all(start * torch.bfloat16.itemsize % 128 == 0 for start in starts)


def test_the_gradient_is_one_concatenation() -> None:
    packing = Packing(("a", "b", "c"), (2, 3, 4))
    y = torch.randn(5, 9, requires_grad=True)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(sum(part.sum() for part in packing.split(y).values()), y)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::cat"] == 1 and "aten::slice_backward" not in counts


def test_bad_input_is_one_sentence(weights: dict[str, torch.Tensor]) -> None:
    packing = Packing.of(weights, TIME_WEIGHTS)
    last = packing.names[-1]
    without = {name: value for name, value in weights.items() if name != last}
    calls = {
        f"without {last} .1 are missing": lambda: packing.pack(without),
        "attn2.to_v.weight .1 are": lambda: Packing.of({"a.attn2.to_k.weight": torch.ones(1)}, TEXT_KEYS_VALUES),
        "a state dict without emb": lambda: Packing.of({}, TIME_WEIGHTS),
        f"{last} of shape": lambda: packing.pack({**weights, last: torch.ones(1)}),
        "one dtype": lambda: packing.pack({**weights, last: weights[last].float()}),
        "rows for 22 entries": lambda: packing.unpack(torch.ones(3, 3)),
        "columns for 22 entries": lambda: packing.split(torch.ones(3, 3)),
    }
    for words, call in calls.items():
        with pytest.raises(KernelError, match=words):
            call()
