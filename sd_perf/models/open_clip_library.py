"""Access to the optional package open_clip: importing it, and reading its models from local files.

Nothing is downloaded. Errors name the config key that asked for the model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.files import one_line, parse_json, read_untrusted
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.models.weight_files import load_into, require_fit, weights_in
from sd_perf.optional import optional
from sd_perf.torch_files import require_bounded

VOCABULARY = 49408
"""tokens of CLIP's byte-pair encoding"""
_MAX_WIDTH = 2048
"""channels of a text tower; the widest of open_clip has 1,280"""


def import_open_clip(key: str) -> ModuleType:
    """Import open_clip; where it is missing, ConfigError naming `key`, which needs it."""
    define_missing_torchvision_ops()
    return optional("open_clip", f"{key}: needs open_clip", "text")


def register_model(open_clip: ModuleType, key: str, model: str) -> str:
    """Make a model known to open_clip; returns its name there.

    `model` is a name that open_clip knows, or the path of a model JSON. Raises ConfigError, naming
    the config key, where it is neither.
    """
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise ConfigError(f"{key}: {model!r}: no such file")
        try:
            # Checked before open_clip has it: once registered, a bad file breaks every later call.
            parse_json(read_untrusted(Path(model), kind=ConfigError))
        except ValueError as error:
            raise ConfigError(
                f"{key}: {model!r} cannot be read as JSON ({one_line(error)})"
            ) from error
        open_clip.add_model_config(model)
        model = Path(model).stem
    if open_clip.get_model_config(model) is None:
        raise ConfigError(f"{key}: {model!r} is no model of open_clip, and no path of a model JSON")
    return model


def read_clip(key: str, model: str, weights: Path) -> tuple[Any, Any]:
    """A CLIP model (`encode_image`, `encode_text`), frozen, float32, on the CPU; and its tokenizer.

    Raises ConfigError, naming the config key, where the model is unknown, and CheckpointError for
    weights that are missing, damaged or another model's.
    """
    open_clip = import_open_clip(key)
    name = register_model(open_clip, key, model)
    state = read_open_clip_weights(weights, key.replace("model", "weights"))
    state.pop("attn_mask", None)  # a constant that old files carry

    def build() -> torch.nn.Module:
        return open_clip.CLIP(**open_clip.get_model_config(name))

    with torch.device("meta"):  # no memory is taken for sizes that the weights have not
        require_fit(built(key, model, build), state, "CLIP", weights)
    clip = built(key, model, build)
    load_into(clip, state, "CLIP", weights)
    return clip.requires_grad_(False).eval(), open_clip.get_tokenizer(name)


def built(key: str, model: str, build: Callable[[], torch.nn.Module]) -> Any:
    """What open_clip builds of a model's sizes; ConfigError where it cannot."""
    try:
        return build()
    except Exception as error:  # whatever a size of another type or a missing one leads to
        raise ConfigError(f"{key}: {model!r} describes no model ({one_line(error)})") from error


def read_open_clip_weights(path: Path, key: str) -> dict[str, torch.Tensor]:
    """The tensors of an open_clip .bin, .pt or .safetensors file; `key` is the config key for it.

    Raises CheckpointError where it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {key} names a file of open_clip weights")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return _with_whole_vocabulary(load_file(path))
        with path.open("rb") as file:
            require_bounded(file)
        return weights_in(torch.load(path, map_location="cpu", weights_only=True), path)
    except CheckpointError:
        raise
    except Exception as error:  # each format has its own errors for damaged files
        raise CheckpointError(
            f"{path}: not a file of open_clip weights ({one_line(error)})"
        ) from error


def _with_whole_vocabulary(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with a complete token embedding.

    Captions of the tiny world use a dozen of CLIP's 49,408 tokens. Its file keeps only their rows
    (`token_embedding.rows`) and numbers (`token_embedding.ids`). Every other token gets a row of 0.
    """
    if "token_embedding.rows" in state:
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids")
        if rows.shape[1] > _MAX_WIDTH:  # before memory is taken for all tokens
            raise ValueError(f"its tokens are {rows.shape[1]:,} wide, over {_MAX_WIDTH:,}")
        whole = torch.zeros(VOCABULARY, rows.shape[1], dtype=rows.dtype)
        whole[ids] = rows
        state["token_embedding.weight"] = whole
    return state
