"""YAML presets: read into a `Config`, strictly.

An unknown key or a value of another type is an error, never ignored. A preset may say
`extends: other.yaml`; its own keys then override those of the other file, section by section.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.files import one_line


def load_preset(path: str | Path) -> Config:
    """The config of a YAML file and of the files that it extends.

    Raises ConfigError, with the path, for a file, key or value that cannot be used.
    """
    tree = _read_chain(Path(path))
    try:
        return config_from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def config_from_dict(tree: dict[str, Any]) -> Config:
    """The config of a nested dict, as a run's manifest holds it; else ConfigError."""
    return _build(Config, tree, "")


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Keys such as `training.seed` whose values differ, each with (old value, new value)."""
    flat_old, flat_new = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return {
        key: (flat_old[key], flat_new[key]) for key in flat_old if flat_old[key] != flat_new[key]
    }


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"seed": 0}} -> {"training.seed": 0}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _read_chain(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The file's sections, over those of the file that it extends."""
    if path.resolve() in extended_by:
        raise ConfigError(f"{path}: extends itself; name another file, or take `extends` out")
    if not path.is_file():
        advice = f"{extended_by[-1]} extends it" if extended_by else "presets are in configs/"
        raise ConfigError(f"{path}: no such config file; {advice}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: must hold sections such as `training:`, not a {type(tree).__name__}"
        )
    base = tree.pop("extends", None)
    if base is None:
        return tree
    return _merge(_read_chain(path.parent / str(base), (*extended_by, path.resolve())), tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `over`; sections that both have are merged key by key."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def _build(cls: type, tree: Any, prefix: str) -> Any:
    """A config dataclass from a dict. `prefix` stands before its keys in messages: "training."."""
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{prefix.rstrip('.')}: {tree!r} cannot be used; it must be a section of keys"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(_unknown_key(f"{prefix}{key}", list(hints), prefix))
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(typing.cast(type, hints[key]), value, f"{prefix}{key}.")
        else:
            values[key] = _convert(value, hints[key], f"{prefix}{key}")
    return cls(**values)


def _unknown_key(key: str, known: list[str], prefix: str) -> str:
    close = difflib.get_close_matches(key.removeprefix(prefix), known, n=1)
    advice = f"did you mean {prefix}{close[0]}?" if close else f"known here: {', '.join(known)}"
    return f"{key}: unknown key; {advice}"


def _convert(value: Any, hint: Any, key: str) -> Any:
    """A YAML value as the type of its field; ConfigError where it is of another type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _convert(value, options[0], key)
    if origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"{key}: {value!r} cannot be used; it must be one of {', '.join(map(str, arguments))}"
        )
    if origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_convert(item, arguments[0], key) for item in value)
        raise ConfigError(f"{key}: {value!r} cannot be used; it must be a list")
    return _scalar(value, hint, key)


def _scalar(value: Any, hint: type, key: str) -> Any:
    """`_convert` for int, float, str and bool. A whole number is taken for a float, too."""
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is hint:
        return value
    name = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise ConfigError(f"{key}: {value!r} cannot be used; it must be {name}")
