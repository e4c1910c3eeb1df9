"""CLIP score: the cosine similarity of each image and its caption.

Hessel et al. 2021 (CLIPScore, arXiv 2104.08718), equation in section 3. The benchmark's variant is
the plain mean of the cosines: no weight of 2.5, no factor of 100, no clamp at 0. The model, its
image preprocessing and its tokenizer are open_clip's own.

Shape letters: B images and captions, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sd_perf.models.open_clip_library import import_open_clip, read_clip


class ClipScorer:
    """Scores images against captions with an open_clip model, in float32.

    `model` is open_clip's name or the path of a model JSON; `weights` is a local file. Nothing is
    downloaded. Raises ConfigError where open_clip or the model is missing, and CheckpointError
    where the weights are missing or another model's.
    """

    def __init__(self, model: str, weights: Path, device: torch.device | str = "cpu") -> None:
        clip, self._tokenize = read_clip("evaluation.clip_model", model, weights)
        self.model = clip.to(device)
        side = self.model.visual.image_size
        open_clip = import_open_clip("evaluation.clip_model")
        self._preprocess = open_clip.image_transform(side, is_train=False)
        self._device = device

    @torch.no_grad()
    def similarities(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cosines (B,) float32, on the CPU, of images (B, 3, H, W) float in [0, 1] and B captions.

        As in the benchmark, images are first truncated to 8 bits per colour and resized by Pillow.
        Raises ValueError where the numbers of images and captions differ, or a value is outside
        [0, 1] or NaN.
        """
        if len(images) != len(captions):
            raise ValueError(
                f"{len(images)} images cannot be scored against {len(captions)} captions"
            )
        if not ((images >= 0) & (images <= 1)).all():  # also false for NaN
            raise ValueError("images must be in [0, 1]")
        prepared = torch.stack([self._preprocess(_to_pillow(image)) for image in images])
        image_features = self.model.encode_image(prepared.to(self._device))
        text_features = self.model.encode_text(self._tokenize(captions).to(self._device))
        return F.cosine_similarity(image_features, text_features).float().cpu()


def _to_pillow(image: torch.Tensor) -> Any:
    """The Pillow image of a tensor (3, H, W) in [0, 1], truncated to 8 bits per colour."""
    from PIL import Image

    return Image.fromarray((image * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())
