"""Weight files: tensors by name; LDM checkpoints and their components.

Reading runs no code from a file. Pickles go through torch's weights-only unpickler with a short
list of harmless stand-ins; safetensors files hold nothing but tensors.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.files import misfit, one_line, parse_json, quoted
from sd_perf.optional import optional
from sd_perf.torch_files import require_bounded

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)

UNET_PREFIX = "model.diffusion_model."
PREFIXES = {"unet": UNET_PREFIX, "vae": "first_stage_model.", "text": "cond_stage_model.model."}
"""component: prefix of its weights' names in an LDM checkpoint"""
TELLTALES = {
    "unet": ("input_blocks.0.0.weight",),
    "vae": ("encoder.conv_in.weight", "decoder.conv_in.weight"),
}
"""component: weights that tell a file of this component alone, whose names have no prefix"""
EMA_PREFIX = "model_ema.diffusion_model"
"""how names of the UNet's averaged weights begin in an LDM checkpoint; the rest has no dots"""
UNET_CONFIG = "sd_perf.unet_config"
"""entry of a .safetensors file's metadata: the UNet's config as JSON"""
AUTOENCODER_CONFIG = "config"
"""the same of an autoencoder's config"""
DIFFUSION_CONFIG = "sd_perf.diffusion_config"
"""the same of the noise schedule and target"""
PREDICTION = "modelspec.prediction_type"
"""entry of a .safetensors file's metadata: v or epsilon (Stability AI's ModelSpec, which others
write and read, too)"""
_LISTED = 10
"""names of weights that a sentence lists"""

INERT_GLOBALS = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
    "pytorch_lightning.callbacks.lr_monitor.LearningRateMonitor",
    "lightning.pytorch.callbacks.model_checkpoint.ModelCheckpoint",
    "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
    "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
"""What Lightning's checkpoints pickle beside tensors: callbacks, as keys of their states, and
learning rates, as numpy scalars. None of it is weights, so a stand-in replaces each and nothing is
imported."""


class _Inert:
    """Stand-in for a pickled object that is not needed; it ignores arguments and state."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read_ldm_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file, by name.

    It is a `.safetensors` file, or a pickle as `torch.save` writes it (`.ckpt`, `.bin`, `.pt`) of
    tensors by name, alone or under Lightning's "state_dict". Tensors are mapped into memory, not
    read. Raises CheckpointError for a file that is missing, truncated or of another kind, and for a
    pickle of anything but tensors, plain containers and `INERT_GLOBALS`.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: there is no such file; give the path of an LDM .ckpt or .safetensors file"
        )
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return weights_in(_unpickled(path), path)


def weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by name that an unpickled file holds, alone or under "state_dict".

    Raises CheckpointError, which names the file, for other content, and for tensors that have not
    a number of their own for each of their elements: sparse ones, and few numbers spread over any
    size, which would take its memory as soon as they are copied.
    """
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict):
        raise CheckpointError(
            f'{path}: holds no weights; give tensors by name, alone or under "state_dict"'
        )
    for name, value in state.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise CheckpointError(
                f"{path}: {quoted(name)} is no tensor, so these are not the weights alone; the "
                "file is of another kind, damaged or hostile"
            )
        if not _is_dense(value):
            raise CheckpointError(
                f"{path}: {quoted(name)} is a tensor without numbers of its own for all its "
                "elements; save dense tensors"
            )
    return dict(state)


def _is_dense(tensor: Tensor) -> bool:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def split_components(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split a checkpoint into {"unet": ..., "vae": ..., "text": ...}, with prefixes removed.

    A component that the checkpoint lacks is empty. Tensors of no component, such as the noise
    schedule, are left out. A file of the UNet or of the autoencoder alone, whose names have no
    prefix, is that component.
    """
    for component, names in TELLTALES.items():
        if any(name in state for name in names):
            own = _without_training(state) if component == "vae" else dict(state)
            return {**{other: {} for other in PREFIXES}, component: own}
    return {
        component: {
            name.removeprefix(prefix): value
            for name, value in state.items()
            if name.startswith(prefix)
        }
        for component, prefix in PREFIXES.items()
    }


def averaged_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The averaged weights of the UNet in an LDM checkpoint; empty where it has none.

    LDM's `LitEma` (`ldm/modules/ema.py`) keeps them under the names of the others without dots.
    """
    names = {name: EMA_PREFIX + name.replace(".", "") for name in split_components(state)["unet"]}
    return {name: state[theirs] for name, theirs in names.items() if theirs in state}


def _without_training(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights in a file of its training, which has a loss with weights, too."""
    parts = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return {name: value for name, value in state.items() if name.startswith(parts)}


def load_into(module: nn.Module, state: Mapping[str, Tensor], what: str, path: str | Path) -> None:
    """Copy weights into a module, after `require_fit`, so either all are copied or none."""
    require_fit(module, state, what, path)
    module.load_state_dict(state)


def filled(build: Callable[[], M], state: Mapping[str, Tensor], what: str, path: Path) -> M:
    """The module that `build` makes, with weights from a file, in float32 on the CPU.

    The module's sizes may be from the file as well, so it is compared with the weights as
    `require_fit` does before it takes memory. Raises CheckpointError for sizes of no module, too.
    """
    try:
        with torch.device("meta"):
            module = build()
    except (ValueError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: its sizes are not those of {what} ({reason(error)}); the file is damaged"
        ) from error
    require_fit(module, state, what, path)
    module = module.to_empty(device="cpu")
    module.load_state_dict(state)
    return module


def require_fit(
    module: nn.Module, state: Mapping[str, Tensor], what: str, path: str | Path
) -> None:
    """CheckpointError where names or shapes of weights differ from those of the module.

    The sentence calls the module `what`, such as "the UNet", and the file `path`. The module may be
    on the meta device.
    """
    own = module.state_dict()
    trouble = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": [
            f"{name}: {tuple(state[name].shape)} there and {tuple(own[name].shape)} in it"
            for name in own
            if name in state and state[name].shape != own[name].shape
        ],
    }
    found = [f"{len(names)} {kind} ({_listed(names)})" for kind, names in trouble.items() if names]
    if found:
        raise CheckpointError(
            f"{path}: not the weights of {what} as configured: {', '.join(found)}; check file and "
            "config"
        )


def _listed(names: list[str]) -> str:
    """The names, or the first of them and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _unpickled(path: Path) -> Any:
    """The content of a torch.save file, with stand-ins for `INERT_GLOBALS` and nothing else."""
    with torch.serialization.safe_globals([(_Inert, name) for name in INERT_GLOBALS]):
        try:
            with path.open("rb") as file:
                require_bounded(file)
            refused = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception as error:  # damage shows as nearly any error
            raise CheckpointError(
                f"{path}: no whole checkpoint of torch.save ({reason(error)}); check its size "
                "and checksum "
                f"(a file of torch before 1.6 must be saved anew)"
            ) from error
        if refused:
            raise CheckpointError(
                f"{path}: refused, because unpickling it would import {', '.join(refused)}, which "
                "no weights need; "
                f'save its "state_dict" alone, with a program that trusts the file'
            )
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"{path}: cannot be read ({reason(error)}); it is damaged or hostile"
            ) from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; CheckpointError where it cannot be read."""
    safetensors = safetensors_package()
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as safetensors ({reason(error)}); check its size and checksum"
        ) from error


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The text that a .safetensors file holds beside its tensors; CheckpointError for no such file.

    The file's header alone is read.
    """
    safetensors = safetensors_package()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({reason(error)})") from error


def safetensors_config(path: Path, kind: type[T], entry: str = "config") -> T | None:
    """The config (a dataclass) in a .safetensors file: JSON under `entry` in its metadata.

    None where the metadata has no such entry. Raises CheckpointError for a file that cannot be
    read, and for metadata that is not a config of this kind.
    """
    text = safetensors_metadata(path).get(entry)
    if text is None:
        return None
    try:
        entries = parse_json(text)
        _require_sizes(entries, kind)
        return kind(
            **{
                key: tuple(value) if isinstance(value, list) else value
                for key, value in entries.items()
            }
        )
    except (ConfigError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its metadata is no {kind.__name__} ({reason(error)})"
        ) from error


def _require_sizes(entries: Any, kind: type) -> None:
    """ValueError for values of other types than a config's defaults, and for absurd sizes."""
    shape = {
        f"{field.name}?": [int] if isinstance(field.default, tuple) else type(field.default)
        for field in dataclasses.fields(kind)
    }
    if fault := misfit(entries, shape):
        raise ValueError(fault)
    for name, value in entries.items():
        sizes = value if isinstance(value, list) else [value]
        most = 64 if name == "num_res_blocks" else 65_536
        if len(sizes) > 16 or any(type(n) is int and not 0 < n <= most for n in sizes):
            raise ValueError(f"{name} is {quoted(value)}, not of sizes from 1 to {most:,}")


def safetensors_package() -> Any:
    """The package safetensors, imported on use, so that this module imports with torch alone."""
    optional("safetensors.torch", "weights need safetensors", "cli")
    return sys.modules["safetensors"]


def reason(error: BaseException) -> str:
    """The first sentence of a library's message; torch's messages go on with unfitting advice."""
    return one_line(error).split(". ", 1)[0]
