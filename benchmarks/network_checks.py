"""Are draws, outputs and gradients right on this device?

Draws must equal the CPU's bit for bit. Networks are compared with the plain one in float64: plain
recipes by fixed budgets, fast ones by the rule of sd_kernels, at most twice the error that plain
torch makes in the same number formats on the same weights and inputs.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from benchmarks.checks import Check, differing, guarded, make_check, relative_error
from benchmarks.gpu_fast import FastRecipe
from benchmarks.gpu_workload import FP32, Predictor, Recipe, channels_last, make_inputs, randomize
from sd_kernels.harness import FLOOR
from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.diffusion.randomness import Stream, normal, philox, uniform_integers
from sd_perf.reference.unet import UNet

CONTEXT_TOKENS = 77
PRECISION_BUDGET = {"plain_fp32": 1e-4, "plain_autocast": 3e-2, "plain_bf16_masters": 3e-2}
"""largest relative error against float64, by plain recipe. On a CPU the small network has 1.6e-6 in
fp32 and 1.3e-2 in bf16; TF32 rounds 8 times finer than bf16, so it would fail as fp32"""
WORST = "gradient of the worst parameter"
SMALL_GRADIENT = 1e-3
"""least norm by which the error of a parameter's gradient is divided, in units of the root mean
square of all gradients: a tiny gradient is little but rounding"""


def check_draws(device: str) -> list[Check]:
    """Philox words, timesteps and normals of the device against the CPU's, bit for bit.

    Sample indices lie on both sides of 2**32.
    """
    indices = torch.tensor([0, 1, 2**31, 2**40 + 7])
    timesteps = DiffusionConfig().num_timesteps
    draws: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "Philox words": lambda index: philox(2**33 + 5, Stream.NOISE, index, 4096),
        "timesteps": lambda index: uniform_integers(5, Stream.TIMESTEP, index, timesteps),
        "normals": lambda index: normal(5, Stream.NOISE, index, 4 * 64 * 64),
    }
    checks = []
    for name, draw in draws.items():
        unlike = differing([draw(indices)], [draw(indices.to(device))])
        checks.append(make_check(f"draws: {name}, elements unlike the CPU's", unlike, 0))
    return checks


def check_precisions(
    config: UNetConfig,
    latent_size: int,
    recipes: Sequence[Recipe],
    device: str,
    reference_device: str,
    gradients: bool,
) -> list[Check]:
    """Output, and gradients if asked for, of each recipe on `device` against float64.

    The float64 network is plain and runs on `reference_device`. Weights and inputs are the same
    float32 values, so the error of a recipe includes its rounding of them. A fast recipe's
    yardstick must come before it.
    """
    with torch.device(reference_device):
        unet = channels_last(UNet(config))
        randomize(unet, seed=0)
    batch = 2 if gradients else 1
    indices = torch.arange(batch)
    moments, context = make_inputs(
        config, indices, latent_size=latent_size, context_tokens=CONTEXT_TOKENS, seed=0
    )
    latents = moments.chunk(2, dim=1)[0] * DiffusionConfig().latent_scale
    inputs = (latents, 500 + 37 * indices, context)
    float64 = dataclasses.replace(FP32, weights=torch.float64)
    wide, moved = copy.deepcopy(unet).double(), _moved(inputs, reference_device)
    exact = _evaluate(wide, float64, moved, gradients=gradients)
    shape = f"{config.model_channels} channels, {latent_size}x{latent_size}, batch {batch}"
    note = f"float64 on {reference_device}; {shape}"
    errors: dict[str, dict[str, float]] = {}
    checks: list[Check] = []

    def of_recipe(recipe: Recipe) -> list[Check]:
        network = recipe.unet(config, device)
        network.load_state_dict(unet.state_dict())
        network, moved = network.to(recipe.weights), _moved(inputs, device)
        results = _evaluate(network, recipe, moved, gradients=gradients)
        errors[recipe.implementation] = precision_errors(results, exact)
        return _precision_checks(recipe, errors, note)

    for recipe in recipes:
        checks += guarded(note, partial(of_recipe, recipe), recipe=recipe.implementation)
    return checks


def _moved(tensors: tuple[torch.Tensor, ...], device: str) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(device) for tensor in tensors)


def _evaluate(
    unet: torch.nn.Module, recipe: Recipe, inputs: tuple[torch.Tensor, ...], *, gradients: bool
) -> list[torch.Tensor]:
    """Output and, if asked for, the gradients of sum(output^2) / 2 by all parameters."""
    with torch.set_grad_enabled(gradients):
        out = Predictor(unet, recipe)(*inputs)
        parts = torch.autograd.grad(out, list(unet.parameters()), out.detach()) if gradients else ()
    return [out.detach(), *parts]


def precision_errors(results: list[torch.Tensor], exact: list[torch.Tensor]) -> dict[str, float]:
    """Relative errors by name: `output`, and where there are gradients `gradients` and `WORST`.

    Both lists hold the output and then the gradients, in the order of the parameters. `gradients`
    is the error of all of them as one vector, `WORST` that of the parameter furthest off.
    """
    errors = {"output": relative_error(results[0], exact[0])}
    if len(exact) == 1:
        return errors
    pairs = list(zip(results[1:], exact[1:], strict=True))
    off = [(mine.to(right.device).double() - right).norm().item() for mine, right in pairs]
    norms = [right.norm().item() for _, right in pairs]
    rms = math.hypot(*norms) / math.sqrt(sum(right.numel() for _, right in pairs))
    least = [SMALL_GRADIENT * rms * math.sqrt(right.numel()) for _, right in pairs]
    worst = max(
        error / max(norm, floor) for error, norm, floor in zip(off, norms, least, strict=True)
    )
    return errors | {"gradients": math.hypot(*off) / math.hypot(*norms), WORST: worst}


def _precision_checks(
    recipe: Recipe, errors: Mapping[str, Mapping[str, float]], note: str
) -> list[Check]:
    """The recipe's errors and their budgets.

    `errors` has those of the recipe and of its yardstick. A recipe that is only a yardstick is not
    checked; a plain recipe has no budget for its worst parameter.
    """
    name = recipe.implementation
    if not isinstance(recipe, FastRecipe):
        return [
            make_check(what, error, PRECISION_BUDGET[name], note=note, recipe=name)
            for what, error in errors[name].items()
            if what != WORST
        ]
    if recipe.yardstick is None:
        return []
    yardstick = recipe.yardstick.implementation
    note = f"twice {yardstick}; {note}"
    return [
        make_check(what, error, 2 * errors[yardstick][what] + FLOOR, note=note, recipe=name)
        for what, error in errors[name].items()
    ]
