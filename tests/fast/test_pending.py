"""Parameters that are packed: views where they are adjacent, and gradients of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sd_perf.fast.pending import added, packed


def parameters(buffer: Tensor, gap: int = 0) -> list[Tensor]:
    """Three of (2, 4), one behind the other in the buffer, the last after a gap."""
    starts = 0, 8, 16 + gap
    return [nn.Parameter(buffer[start : start + 8].view(2, 4)) for start in starts]


def gradients(weights: list[Tensor]) -> list[Tensor]:
    (packed(weights) * torch.arange(24.0).view(6, 4)).sum().backward()
    return [weight.grad for weight in weights if weight.grad is not None]


def test_adjacent_parameters_are_not_copied() -> None:
    buffer = torch.randn(32)
    weights = parameters(buffer)
    assert packed(weights).data_ptr() == buffer.data_ptr()
    assert torch.equal(packed(weights), torch.cat(weights))
    apart = parameters(buffer, gap=8)
    assert packed(apart).data_ptr() != buffer.data_ptr()
    assert torch.equal(packed(apart), torch.cat(apart))
    for ours, plain in zip(gradients(weights), gradients(apart), strict=True):
        assert torch.equal(ours, plain)


def test_other_orders_and_other_storages_are_copied() -> None:
    one, two, three = parameters(torch.randn(24))
    for weights in ([two, one], [one, three], [one, torch.randn(2, 4)]):
        assert torch.equal(packed(weights), torch.cat(weights))


def test_accumulating_into_one_vector_leaves_its_partner_alone() -> None:
    vectors = [nn.Parameter(torch.randn(3)) for _ in range(4)]
    for _ in range(2):
        added(vectors).square().sum().backward()
    expected = 2 * 2 * (torch.cat(vectors[:2]) + torch.cat(vectors[2:]))
    for place, vector in enumerate(vectors):
        half = slice(3 * (place % 2), 3 * (place % 2) + 3)
        torch.testing.assert_close(vector.grad, expected[half])
