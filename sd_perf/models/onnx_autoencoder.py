"""Autoencoders in ONNX files, for preparing data and decoding pictures.

The only module that imports onnxruntime.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sd_perf.errors import DataError
from sd_perf.files import one_line
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional


def _open_session(path: str | Path, threads: int) -> Any:
    """An inference session on the CPU; ConfigError without onnxruntime, DataError for bad files."""
    onnxruntime = optional("onnxruntime", "ONNX models need onnxruntime", "onnx")
    if not Path(path).is_file():
        raise DataError(f"{path} is not a file; name an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise DataError(f"{path} cannot be loaded as an ONNX model ({one_line(error)})") from error


def _run(session: Any, path: str | Path, tensor: torch.Tensor) -> list[np.ndarray]:
    """All outputs of the model for its one input; DataError where it does not take the input."""
    inputs = {session.get_inputs()[0].name: tensor.float().contiguous().numpy()}
    try:
        return session.run(None, inputs)
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise DataError(
            f"{path} does not take an input of shape {tuple(tensor.shape)} ({one_line(error)})"
        ) from error


class OnnxEncoder:
    """An ONNX encoder that gives the unscaled mean of 4 latent channels, and no variance."""

    def __init__(self, path: str | Path, log_variance: float = -10.0, threads: int = 0) -> None:
        """Load the encoder.

        log_variance: constant given to every latent, since the model has none.
        threads: CPU threads; 0 takes all cores.

        Raises ConfigError without onnxruntime, DataError for a file that is no model.
        """
        self._path = path
        self._log_variance = log_variance
        self._session = _open_session(path, threads)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in the range of the model to moments (B, 8, H/8, W/8) float32."""
        mean = torch.from_numpy(_run(self._session, self._path, images)[0])
        batch, _, height, width = images.shape
        right = (batch, 4, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
        if tuple(mean.shape) != right:
            raise DataError(
                f"{self._path} gives latents of shape {tuple(mean.shape)}, not {right}; it is "
                "another encoder"
            )
        return torch.cat([mean, torch.full_like(mean, self._log_variance)], dim=1)


class OnnxDecoder:
    """An ONNX decoder of unscaled latents.

    A model with several outputs gives parts of one picture at several sizes; they are resized to
    the largest and added.
    """

    def __init__(self, path: str | Path, threads: int = 0) -> None:
        """Load the decoder; threads 0 takes all cores.

        Raises ConfigError without onnxruntime, DataError for a file that is no model.
        """
        self._path = path
        self._session = _open_session(path, threads)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """Unscaled latents (B, 4, H, W) to images (B, 3, 8H, 8W) float32, clamped to [-1, 1]."""
        maps = [torch.from_numpy(output) for output in _run(self._session, self._path, latents)]
        batch, _, height, width = latents.shape
        right = (batch, 3, PIXELS_PER_LATENT * height, PIXELS_PER_LATENT * width)
        largest = max(maps, key=lambda part: part.shape[-1])
        if tuple(largest.shape) != right:
            raise DataError(
                f"{self._path} gives images of shape {tuple(largest.shape)}, not {right}"
            )
        images = torch.zeros(right)
        for part in maps:
            images += F.interpolate(part, size=right[-2:], mode="bilinear", align_corners=False)
        return images.clamp(-1, 1)
