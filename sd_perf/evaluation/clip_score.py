"""CLIP score: the cosine between each image and its own caption (Hessel et al. 2021,
arXiv:2104.08718).

The benchmark's variant is the plain mean of the cosines: no weight of 2.5, no factor of 100, no
clamp at 0. The model, its picture preparation and its tokenizer are open_clip's own.

Shape letters: B images and captions, H rows, W columns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from sd_perf.models.open_clip_library import import_open_clip, read_clip


class ClipScorer:
    """Both towers of an open_clip model, given by name or JSON file, with weights from a local
    file, in float32.

    ConfigError where open_clip or the model is missing, CheckpointError where the weights are
    missing or another model's. Nothing is downloaded.
    """

    def __init__(self, model: str, weights: Path, device: torch.device | str = "cpu") -> None:
        clip, self._tokenize = read_clip("evaluation.clip_model", model, weights)
        self.model = clip.to(device)
        side = self.model.visual.image_size
        self._prepare = import_open_clip("evaluation.clip_model").image_transform(
            side, is_train=False
        )
        self._device = device

    @torch.no_grad()
    def similarities(self, images: torch.Tensor, captions: list[str]) -> torch.Tensor:
        """Cosines (B,) float32, on the CPU, of images (B, 3, H, W) float in [0, 1] with their
        captions.

        As the benchmark does, images become 8-bit pictures first (x 255, truncated) and are resized
        by Pillow. ValueError where the numbers of images and captions differ, or a value is outside
        [0, 1] or no number.
        """
        if len(images) != len(captions):
            raise ValueError(
                f"{len(images)} images cannot be scored against {len(captions)} captions"
            )
        if not ((images >= 0) & (images <= 1)).all():  # also false for NaN
            raise ValueError("images must be in [0, 1]")
        pictures = torch.stack([self._prepare(_to_picture(image)) for image in images]).to(
            self._device
        )
        tokens = self._tokenize(captions).to(self._device)
        return (
            F.cosine_similarity(self.model.encode_image(pictures), self.model.encode_text(tokens))
            .float()
            .cpu()
        )


def _to_picture(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image * 255).to(torch.uint8).permute(1, 2, 0).cpu().numpy())
