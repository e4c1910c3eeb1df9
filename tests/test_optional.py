"""A missing package is one sentence."""

from __future__ import annotations

import json
import sys

import pytest

from sd_perf.errors import ConfigError
from sd_perf.optional import optional


def test_there():
    assert optional("json", "this needs json", "cli") is json


def test_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(
        ConfigError,
        match=r"this needs json \(import of json halted.*; pip install 'sd-perf\[cli\]'$",
    ):
        optional("json", "this needs json", "cli")
