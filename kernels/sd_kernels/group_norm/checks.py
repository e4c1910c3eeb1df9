"""The checks of inputs that all backends of this op share; shape letters as in `reference`."""

from __future__ import annotations

import torch

from sd_kernels.errors import require, require_floating, require_one_dtype

OP = "group_norm"


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    num_groups: int,
    double: bool = False,
) -> None:
    """Raise KernelError unless shapes and dtypes fit; each backend checks memory order itself."""
    given = [tensor for tensor in (x, weight, bias, shift, residual, skip) if tensor is not None]
    require_floating(OP, *given, double=double)
    images = (
        {"x": x}
        | ({} if residual is None else {"residual": residual})
        | ({} if skip is None else {"skip": skip})
    )
    for name, image in images.items():
        require(
            image.dim() == 4, OP, f"{name} of shape {tuple(image.shape)}", "images (B, C, H, W)"
        )
    require_one_dtype(OP, *images.values())
    B, C1, H, W = x.shape
    if residual is not None:
        require(
            residual.shape == x.shape,
            OP,
            f"a residual of shape {tuple(residual.shape)}",
            f"{tuple(x.shape)}",
        )
    if shift is not None:
        fits = shift.shape in ((B, C1), (C1,))
        require(fits, OP, f"a shift of shape {tuple(shift.shape)}", f"{(B, C1)} or ({C1},)")
    C = C1
    if skip is not None:
        C += skip.shape[1]
        require(
            skip.shape == (B, C - C1, H, W),
            OP,
            f"skip of shape {tuple(skip.shape)}",
            f"({B}, any, {H}, {W})",
        )
    shapes = f"weight {tuple(weight.shape)} and bias {tuple(bias.shape)}"
    require(weight.shape == bias.shape == (C,), OP, shapes, f"({C},) for {C} channels")
    divides = num_groups > 0 and C % num_groups == 0
    require(
        divides,
        OP,
        f"{C} channels in {num_groups} groups",
        "a positive number of groups that divides the channels",
    )
