"""ONNX autoencoders: unusable files. With real ones: tests/data/prepare/test_moments.py."""

from __future__ import annotations

import sys

import pytest

from sd_perf.errors import DataError, UserError
from sd_perf.models.onnx_autoencoder import OnnxDecoder, OnnxEncoder


def test_unusable_onnx_files(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    with pytest.raises(DataError, match="not a file"):
        OnnxEncoder(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(DataError, match=r"bad\.onnx cannot be loaded"):
        OnnxDecoder(tmp_path / "bad.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'sd-perf\[onnx\]'"):
        OnnxEncoder(tmp_path / "bad.onnx")
