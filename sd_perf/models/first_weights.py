"""The weights in `model.init`, which training begins from: read, and held to the config."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import FIRST_WEIGHTS, SPEED_ONLY, Config
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.files import opened_untrusted
from sd_perf.models.diffusers_folder import WEIGHTS, is_diffusers_folder
from sd_perf.models.readers import find_unet, is_weight_file, newest_checkpoint, told_diffusion
from sd_perf.models.weight_files import require_fit
from sd_perf.models.written_weights import dtypes_of
from sd_perf.reference.unet import UNet
from sd_perf.runs.checkpoint_files import STATE_NAME


def read_first_weights(config: Config) -> dict[str, torch.Tensor]:
    """The UNet's weights in model.init, by name, on the CPU, in the dtypes they are stored in.

    What the source tells of its network and its diffusion must be what the config says: ConfigError
    names the first field that is not. Groups of a file that does not tell them, and the prediction
    of one without a scheduler, are the config's word. CheckpointError where names or shapes differ.
    """
    source = Path(config.model.init)
    state, network = find_unet(source, config.model.init_ema)
    own = (*SPEED_ONLY, *FIRST_WEIGHTS)
    told = {} if network is None else {k: v for k, v in vars(network).items() if k not in own}
    _require_same("model", told, config.model, source)
    diffusion = told_diffusion(source)
    # Ways of training that weights may be begun without. Who has learned to draw from noise alone
    # goes on so.
    diffusion.pop("offset_noise", None)
    if not diffusion.get("zero_terminal_snr"):
        diffusion.pop("zero_terminal_snr", None)
    _require_same("diffusion", diffusion, config.diffusion, source)
    with torch.device("meta"):  # names and shapes only, no memory
        unet = UNet(config.model.network)
    require_fit(unet, state, "the UNet", source)
    return state


def _require_same(section: str, told: Mapping[str, Any], mine: Any, source: Path) -> None:
    for name, theirs in told.items():
        value = getattr(mine, name)
        if value != theirs:
            shown, right = (list(v) if isinstance(v, tuple) else v for v in (value, theirs))
            raise ConfigError(
                f"{section}.{name}: {shown!r} cannot be used, since the weights to begin from were "
                f"trained with {right!r} ({source}); set it to that, or give another model.init"
            )


def copy_first_weights(unet: torch.nn.Module, config: Config) -> None:
    """Replace the weights of either network by those in model.init."""
    state = read_first_weights(config)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(state[name])


def first_weights_record(config: Config) -> dict[str, Any]:
    """What a run folder keeps of the weights it began from: path, and SHA-256 of each file."""
    source = Path(config.model.init)
    files = {str(file): _digest(file) for file in _files(source)}
    return {"init": str(source), "init_ema": config.model.init_ema, "sha256": files}


def _digest(file: Path) -> str:
    with opened_untrusted(file, "give another model.init", CheckpointError) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _files(source: Path) -> Iterator[Path]:
    """Files that say which weights a source holds; a checkpoint's state.json has digests of all."""
    if is_weight_file(source):
        yield source
    elif is_diffusers_folder(source):
        for folder in (source, source / "unet", source / "unet_ema"):
            if (folder / "config.json").is_file():
                yield from [folder / "config.json", *sorted(folder.glob(f"{WEIGHTS}*"))]
    else:
        yield newest_checkpoint(source)[0] / STATE_NAME


def first_weights_in_words(config: Config) -> str:
    """Where training begins from, for people; weights that are there are read and compared.

    Raises what `read_first_weights` does for weights that are there and do not fit.
    """
    seed, model = config.training.seed, config.model
    if not model.init:
        return f"random weights of {'a random seed' if seed is None else f'seed {seed}'}"
    words = f"the {'averaged ' if model.init_ema else ''}weights in {model.init}"
    if not Path(model.init).exists():
        return f"{words} (not there yet)"
    state = read_first_weights(config)
    return f"{words} ({len(state)} tensors of {dtypes_of(state)}, which fit)"
