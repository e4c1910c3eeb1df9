"""Linears of one input as one product: text keys and values of all cross-attentions, time embeddings of all blocks.

Weights that multiply the same input are kept as one tensor, stacked along their rows; in state dicts their names stay
what they were. The sixteen cross-attentions of Stable Diffusion v2 make one product of 24,960 columns instead of 32
small ones, its 22 time projections one of 20,160. Each block is given its columns as a view: rows are the whole width
apart, which attention kernels take as it is (all of the UNet's columns start at multiples of 128 bytes in bfloat16).

A bias that is added where the time embedding is (a convolution's, say) can be packed in the same order and be added to
the packed bias, once for all blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sd_kernels.errors import KernelError, require

TEXT_KEYS_VALUES = ("attn2.to_k.weight", "attn2.to_v.weight")
"""endings of names: weights that multiply the text, in the order of a block's columns"""
TIME_WEIGHTS, TIME_BIASES = ("emb_layers.1.weight",), ("emb_layers.1.bias",)
"""endings of names: projections of the time embedding"""


@dataclass(frozen=True)
class Packing:
    """Which entries of a state dict are kept as one tensor, in this order along its first axis, and their lengths."""

    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, state_dict: Mapping[str, torch.Tensor], endings: tuple[str, ...]) -> Packing:
        """All entries with these endings: of each prefix every ending in turn, prefixes in the state dict's order."""
        found = [name.removesuffix(end) for name in state_dict for end in endings if name.endswith(end)]
        names = tuple(prefix + end for prefix in dict.fromkeys(found) for end in endings)
        require(bool(names), "packing", "a state dict without " + " or ".join(endings), "one that has them")
        _require_all(names, state_dict)
        return cls(names, tuple(state_dict[name].shape[0] for name in names))

    def pack(self, state_dict: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """One tensor (sum of sizes, ...) of the entries: weights, or moments kept under the weights' names."""
        _require_all(self.names, state_dict)
        tensors = [state_dict[name] for name in self.names]
        for name, size, tensor in zip(self.names, self.sizes, tensors, strict=True):
            expected = (size, *tensors[0].shape[1:])
            require(tensor.shape == expected, "packing", f"{name} of shape {tuple(tensor.shape)}", f"{expected}")
            both = f"{name} of {tensor.dtype} beside {tensors[0].dtype}"
            require(tensor.dtype == tensors[0].dtype, "packing", both, "one dtype, since torch would promote")
        return torch.cat(tensors)

    def unpack(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        """The entries by name, views of the packed tensor (formats that refuse shared memory need clones)."""
        rows, takes = sum(self.sizes), f"{sum(self.sizes)} rows for {len(self.sizes)} entries"
        require(packed.shape[0] == rows, "packing", f"a packed tensor of shape {tuple(packed.shape)}", takes)
        return dict(zip(self.names, packed.split(self.sizes), strict=True))

    def split(self, y: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns, by name, of y (..., sum of sizes), a product with the packed weight.

        They come of one split, whose gradient is one concatenation. Slices taken one by one would each make a gradient
        of the whole width, mostly zeros, to be summed.
        """
        columns, takes = sum(self.sizes), f"{sum(self.sizes)} columns for {len(self.sizes)} entries"
        require(y.shape[-1] == columns, "packing", f"a product of shape {tuple(y.shape)}", takes)
        return dict(zip(self.names, y.split(self.sizes, dim=-1), strict=True))


def _require_all(names: tuple[str, ...], state_dict: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise KernelError(f"packing: got a state dict without {missing[0]} ({len(missing)} are missing); takes all")
