"""Autoencoders from ONNX files, for preparing and looking at data. The only importer of
onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sd_perf.errors import DataError
from sd_perf.optional import optional

FACTOR = 8
"""image pixels per latent pixel, along each side"""


def _open_session(path: str | Path, threads: int) -> Any:
    onnxruntime = optional("onnxruntime", "ONNX models need onnxruntime", "onnx")
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file; name an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise DataError(f"{path} cannot be loaded as an ONNX model: {error}") from error


def _run(session: Any, path: str | Path, tensor: torch.Tensor) -> list[np.ndarray]:
    try:
        outputs = session.run(
            None, {session.get_inputs()[0].name: tensor.float().contiguous().numpy()}
        )
    except Exception as error:  # see above
        raise DataError(
            f"{path} does not take an input of shape {tuple(tensor.shape)}: {error}"
        ) from error
    return outputs


class OnnxEncoder:
    """An encoder that gives the latent mean alone (4 channels, factor 8), before any scale."""

    def __init__(self, path: str | Path, log_variance: float = -10.0, threads: int = 0) -> None:
        """log_variance: constant given to every latent; threads: 0 takes all cores. ConfigError,
        DataError."""
        self._path = path
        self._log_variance = log_variance
        self._session = _open_session(path, threads)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) float in the range the model wants -> moments (B, 8, H/8, W/8)
        float32."""
        mean = torch.from_numpy(_run(self._session, self._path, images)[0])
        batch, _, height, width = images.shape
        right = (batch, 4, height // FACTOR, width // FACTOR)
        if tuple(mean.shape) != right:
            raise DataError(
                f"{self._path} gives latents of shape {tuple(mean.shape)}, not {right}; it is "
                "another encoder"
            )
        return torch.cat([mean, torch.full_like(mean, self._log_variance)], dim=1)


class OnnxDecoder:
    """A decoder of raw latents; outputs of several sizes are parts of one picture and are added
    up."""

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        """threads: 0 takes all cores. Raises ConfigError without onnxruntime, DataError for a file
        that is no model."""
        self._path = path
        self._session = _open_session(path, threads)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents (B, 4, H, W), that is, latents / latent_scale -> images (B, 3, 8H, 8W)
        float32 in [-1, 1]."""
        maps = [torch.from_numpy(output) for output in _run(self._session, self._path, latents)]
        batch, _, height, width = latents.shape
        right = (batch, 3, FACTOR * height, FACTOR * width)
        largest = max(maps, key=lambda part: part.shape[-1])
        if tuple(largest.shape) != right:
            raise DataError(
                f"{self._path} gives images of shape {tuple(largest.shape)}, not {right}"
            )
        images = torch.zeros(right)
        for part in maps:
            images += F.interpolate(part, size=right[-2:], mode="bilinear", align_corners=False)
        return images.clamp(-1, 1)
