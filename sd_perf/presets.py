"""YAML presets: read into a `Config`, strictly.

An unknown key, a key given twice and a value of another type are errors, never ignored. A preset
may say `extends: other.yaml`; its own keys then override those of the other file, section by
section.

YAML 1.1 reads some plain words as what few people mean: 1:30 as 90, 010 as 8, no as false and
2026-05-01 as a date. Here they are text, which a field of numbers refuses. A field of true or false
takes yes, no, on and off, too. Aliases and tags, which no preset needs, are refused.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.files import is_absent, one_line, quoted, read_untrusted

MAX_PRESET_BYTES = 2**18
"""largest preset that is read; the reader is slow, and people write a few kilobytes"""
_MAX_DEPTH = 16
"""sections and lists within each other in a preset; the config has three"""
MAX_ITEMS = 64
"""items in a list of a preset; the config's lists have one per level of the network"""
_SWITCH_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


class _Loader(yaml.SafeLoader):
    """Reads plain words as numbers, true, false and null only where nobody means anything else."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 (a class attribute in yaml, too)


for _kind, _words, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", list("-+0123456789")),
    (
        "float",
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^({_words})$"), _first)


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


def parse_value(text: str) -> Any:
    """The value that a field of a preset has after its colon, such as 8 or [1, 2].

    ConfigError for what no preset may hold.
    """
    try:
        _require_plain(text)
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{quoted(text)} cannot be read as YAML ({one_line(error)})") from error


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
    if _real(path) in extended_by:
        raise ConfigError(f"{path}: extends itself; name another file, or take `extends` out")
    if is_absent(path):
        advice = f"{extended_by[-1]} extends it" if extended_by else "presets are in configs/"
        raise ConfigError(f"{path}: no such config file; {advice}")
    tree = _read_yaml(path)
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: must hold sections such as `training:`, not a {type(tree).__name__}"
        )
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends: {quoted(base)} cannot be used; it must be a file")
    return _merge(_read_chain(path.parent / base, (*extended_by, _real(path))), tree)


def _real(path: Path) -> Path:
    """The path without links, by which a file is known again; one that leads nowhere stays."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path.absolute()


def _read_yaml(path: Path) -> Any:
    """The value in a preset's file; {} for an empty one."""
    content = read_untrusted(
        path, MAX_PRESET_BYTES, remedy="give a YAML file of sections", kind=ConfigError
    )
    try:
        loader = _Loader(content.decode("utf-8"))
        _require_plain(content.decode("utf-8"))
        node = loader.get_single_node()
        if node is None:
            return {}
        _require_unique(node, "")
        return loader.construct_document(node) or {}
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({one_line(error)})") from error


def _require_plain(text: str) -> None:
    """ConfigError for aliases, tags and deep nesting, with the line, before anything is built."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        where = f"line {event.start_mark.line + 1}"  # type: ignore[union-attr]
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: the alias *{event.anchor} is refused; write it out")
        if tag := getattr(event, "tag", None):
            raise ConfigError(f"{where}: the tag {quoted(tag)} is refused; write plain YAML")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ConfigError(
                f"{where}: nested deeper than {_MAX_DEPTH}; a config has no such value"
            )


def _require_unique(node: yaml.Node, prefix: str) -> None:
    """ConfigError, with both lines, for a key that a mapping has twice."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _require_unique(item, prefix)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"line {line}: a key must be a word")
        name = f"{prefix}{key.value[:100]}"
        if key.value in lines:
            raise ConfigError(
                f"{name}: given twice, on lines {lines[key.value]} and {line}; keep one"
            )
        lines[key.value] = line
        _require_unique(value, f"{name}.")


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
            f"{prefix.rstrip('.')}: {quoted(tree)} cannot be used; it must be a section of keys"
        )
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise ConfigError(_unknown_key(f"{prefix}{str(key)[:100]}", list(hints), prefix))
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
            f"{key}: {quoted(value)} cannot be used; "
            f"it must be one of {', '.join(map(str, arguments))}"
        )
    if origin is tuple:
        if isinstance(value, list | tuple) and len(value) <= MAX_ITEMS:
            return tuple(_convert(item, arguments[0], key) for item in value)
        raise ConfigError(
            f"{key}: {quoted(value)} cannot be used; it must be a list of at most {MAX_ITEMS}"
        )
    return _scalar(value, hint, key)


def _scalar(value: Any, hint: type, key: str) -> Any:
    """`_convert` for int, float, str and bool. A whole number is taken for a float, too."""
    if hint is float and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as text
        except (TypeError, ValueError, OverflowError):
            pass
    elif type(value) is hint and not (isinstance(value, int) and abs(value) >= 2**64):
        return value
    elif hint is bool and isinstance(value, str) and value.lower() in _SWITCH_WORDS:
        return _SWITCH_WORDS[value.lower()]
    name = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
    raise ConfigError(f"{key}: {quoted(value)} cannot be used; it must be {name}")
