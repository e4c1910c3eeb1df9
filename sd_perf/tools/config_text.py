"""A config as text: YAML that says what each key means, and a JSON schema for editors."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from sd_perf.config import Config, Rule
from sd_perf.config.descriptions import field_descriptions, section_description
from sd_perf.presets import MAX_ITEMS, config_differences, load_preset, parse_value
from sd_perf.runs.folder import read_run_config
from sd_perf.visible import visible

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}
_GROUPED_DIGITS = r"^[-+]?[0-9]+(_[0-9]+)+$"
"""28_000, a number to the reader of presets, is text to editors, which follow YAML 1.2"""


def read_config(path: Path) -> Config:
    """The config of a preset, or of the run in a folder."""
    return read_run_config(path) if path.is_dir() else load_preset(path)


def as_yaml(config: Config, changed_only: bool = False) -> str:
    """The config as a preset, with meaning, unit and default of each key as comments.

    `changed_only` leaves out the keys that have their default.
    """
    return "\n".join(_yaml_lines(config, changed_only))


def _yaml_lines(config: Config, changed_only: bool) -> Iterator[str]:
    for section in dataclasses.fields(config):
        values = getattr(config, section.name)
        descriptions = field_descriptions(type(values))
        lines = []
        for field in dataclasses.fields(values):
            value = getattr(values, field.name)
            if changed_only and value == field.default:
                continue
            before = "" if value == field.default else f"    # default: {_value(field.default)}"
            lines += [
                f"  # {descriptions[field.name]}",
                f"  {field.name}: {_value(value)}{before}",
            ]
        if lines:
            yield from (f"# {section_description(type(values))}", f"{section.name}:", *lines, "")


def _value(value: Any) -> str:
    """A value as it stands after its colon, so that the reader of presets reads the same."""
    value = list(value) if isinstance(value, tuple) else value
    for style in (None, '"'):
        text = yaml.safe_dump(value, default_flow_style=True, default_style=style, width=10**6)
        text = text.removesuffix("\n").removesuffix("\n...")
        if "\n" not in text and parse_value(text) == value:
            return text
    raise AssertionError(f"{value!r} has no YAML on one line")


def differences(first: Path, second: Path) -> Table | None:
    """The keys in which two presets or runs differ, as a table; None where they are the same."""
    differing = config_differences(read_config(first), read_config(second))
    if not differing:
        return None
    table = Table(visible("key"), visible(first), visible(second))
    for key, (one, other) in differing.items():
        table.add_row(key, visible(_value(one)), visible(_value(other)))
    return table


def schema() -> dict[str, Any]:
    """The JSON schema (draft 7, which editors know) of a preset."""
    sections = {
        field.name: _section(typing.get_type_hints(Config)[field.name])
        for field in dataclasses.fields(Config)
    }
    extends = {"type": "string", "description": "another preset, whose keys these override"}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Preset of sd-perf",
        "type": "object",
        "additionalProperties": False,
        "properties": {"extends": extends, **sections},
    }


def _section(section: type) -> dict[str, Any]:
    hints, descriptions = (
        typing.get_type_hints(section, include_extras=True),
        field_descriptions(section),
    )
    fields = {}
    for field in dataclasses.fields(section):
        rules = _rules(hints[field.name])
        right = "; ".join(rule.right for rule in rules if not rule.schema)
        fields[field.name] = {
            "description": descriptions[field.name] + (f" ({right})" if right else ""),
            "default": list(field.default) if isinstance(field.default, tuple) else field.default,
            **_type(hints[field.name]),
            **dict(limit for rule in rules for limit in rule.schema),
        }
    return {
        "type": "object",
        "description": section_description(section),
        "additionalProperties": False,
        "properties": fields,
    }


def _rules(hint: Any) -> list[Rule]:
    return [rule for rule in getattr(hint, "__metadata__", ()) if isinstance(rule, Rule)]


def _type(hint: Any) -> dict[str, Any]:
    """What a schema says of a type of `presets`: scalars, literals, tuples and None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin in (typing.Union, types.UnionType):
        (some,) = (option for option in arguments if option is not type(None))
        inner = _type(some)
        if "enum" in inner:
            return {"enum": [*inner["enum"], None]}
        return {**inner, "type": [*_listed(inner["type"]), "null"]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": _type(arguments[0]), "maxItems": MAX_ITEMS}
    if hint is int:
        return {"type": ["integer", "string"], "pattern": _GROUPED_DIGITS}
    if hint in _TYPES:
        return {"type": _TYPES[hint]}
    raise AssertionError(f"a field of type {hint} has no JSON schema yet")


def _listed(kind: str | list[str]) -> list[str]:
    return kind if isinstance(kind, list) else [kind]
