"""open_clip as an optional package: imported late, with sentences for what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

from sd_perf.errors import ConfigError
from sd_perf.files import one_line
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops


def import_open_clip(key: str) -> ModuleType:
    """The package; ConfigError naming the config key that needs it."""
    define_missing_torchvision_ops()
    try:
        import open_clip
    except ImportError as error:
        raise ConfigError(f"{key}: needs open_clip ({one_line(error)}); pip install 'sd-perf[text]'") from error
    return open_clip


def register_model(open_clip: ModuleType, key: str, model: str) -> str:
    """open_clip's name of a model given by name or by the path of a model JSON; ConfigError where there is none."""
    if model.endswith(".json"):
        if not Path(model).is_file():
            raise ConfigError(f"{key}: {model!r}: no such file")
        try:
            json.loads(Path(model).read_text(encoding="utf-8"))  # open_clip would stumble over it ever after
        except ValueError as error:
            raise ConfigError(f"{key}: {model!r} cannot be read as JSON ({one_line(error)})") from error
        open_clip.add_model_config(model)
        model = Path(model).stem
    if open_clip.get_model_config(model) is None:
        raise ConfigError(f"{key}: {model!r} is no model of open_clip, and no path of a model JSON")
    return model
