"""Parameters of a UNet: random values that hide no fault, and kinds for the report."""

from __future__ import annotations

import torch

_KINDS = {
    "attn1": "self-attention",
    "attn2": "cross-attention",
    ".ff.": "feed-forward",
    "proj_in": "projections of the transformers",
    "proj_out": "projections of the transformers",
    "emb": "time embedding",
    "skip_connection": "skip convolutions",
}
"""kinds of weight matrices, by a part of the parameter's name; the first that fits"""


@torch.no_grad()
def randomise(unet: torch.nn.Module, seed: int) -> None:
    """Fill all parameters in place, as a function of seed, order and shape alone.

    Networks with the same parameters thus get the same numbers, whatever their implementation,
    device and memory format. Matrices keep the variance of their input, norms scale by about 1,
    and no layer stays at its initial zero, which would hide all that comes before it.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in unet.named_parameters():
        is_matrix, is_norm = parameter.dim() > 1, parameter.dim() == 1 and name.endswith("weight")
        std = parameter[0].numel() ** -0.5 if is_matrix else 0.1
        mean = 1.0 if is_norm else 0.0
        # By copying: drawn in place, the numbers would follow the order of the memory.
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)


def indices_by_kind(unet: torch.nn.Module) -> dict[str, list[int]]:
    """Indices into `list(unet.parameters())` by kind of parameter, in the words of the report."""
    kinds: dict[str, list[int]] = {}
    for index, (name, parameter) in enumerate(unet.named_parameters()):
        kinds.setdefault(_kind(name, parameter), []).append(index)
    return kinds


def _kind(name: str, parameter: torch.Tensor) -> str:
    if name.endswith("bias"):
        return "biases"
    if parameter.dim() == 1:
        return "norms"
    return next((kind for part, kind in _KINDS.items() if part in name), "convolutions")
