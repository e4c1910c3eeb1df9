"""A run's config as HTML, with what is not the default in bold."""

from __future__ import annotations

import dataclasses
import json
from html import escape
from typing import Any

from sd_perf.config import Config
from sd_perf.tools.html import quiet


def config_table(config: dict[str, Any]) -> str:
    """A table per section of a manifest's config, which another version may have written."""
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))  # tuples as JSON has them
    sections = []
    for section, fields in config.items():
        fields = fields if isinstance(fields, dict) else {"": fields}
        known = defaults.get(section, {})
        rows = "".join(_row(key, value, known) for key, value in fields.items())
        sections.append(f"<section><h3>{escape(section)}</h3><table>{rows}</table></section>")
    how = quiet("Bold: not the default of this version, which is given below it.")
    return f'{how}<div class="config">{"".join(sections)}</div>'


def _row(key: str, value: Any, defaults: dict[str, Any]) -> str:
    cells = f"<td>{escape(key)}</td><td>{escape(in_words(value))}"
    if key in defaults and defaults[key] == value:
        return f"<tr>{cells}</td></tr>"
    default = "unknown to this version"
    if key in defaults:
        default = f"default {in_words(defaults[key])}"
    return f'<tr class="changed">{cells}<small>{escape(default)}</small></td></tr>'


def in_words(value: Any) -> str:
    """A config value as a person reads it."""
    if value is None:
        return "none"
    if value == "":
        return "(empty)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
