"""What training changes of a sample at random: its caption, and how its picture is seen.

Every draw depends on (seed, position of the sample in the run) alone, as all draws do. So it is the
same at any world size and in a resumed run, and another in every epoch.

Shape letters: B samples, T text tokens, D context channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from sd_perf.data.batch import Batch, Loader
from sd_perf.data.resize import AS_IT_IS, View
from sd_perf.data.usage import Usage
from sd_perf.diffusion.randomness import Stream, philox

_WORDS = 2.0**32


def draw_views(seed: int, positions: np.ndarray, *, flip: bool, crop: bool) -> list[View]:
    """The views of the pictures at positions (B,): half of them flipped, cut out anywhere."""
    if not (flip or crop):
        return [AS_IT_IS] * len(positions)
    words = philox(seed, Stream.VIEW, torch.from_numpy(positions), 2).tolist()
    return [
        View(flip and side >= _WORDS / 2, place / _WORDS if crop else None) for side, place in words
    ]


def is_dropped(seed: int, positions: torch.Tensor, share: float) -> torch.Tensor:
    """(B,) bool: whether the caption at each position (B,) int64 is left out."""
    return philox(seed, Stream.CAPTION, positions, 1)[:, 0] < share * _WORDS


class CaptionDropout:
    """A loader whose batches lack a share of their captions; a `Loader`.

    The samples have the empty caption, from which a network learns the unconditional prediction
    that guidance needs: Ho & Salimans 2022 (arXiv 2207.12598), algorithm 1.
    """

    def __init__(
        self, loader: Loader, seed: int, share: float, empty: torch.Tensor | None = None
    ) -> None:
        """`empty` is (T, D), the empty caption's text states, where batches hold text states."""
        self._loader, self._seed, self._share, self._empty = loader, seed, share, empty
        self.num_samples = loader.num_samples
        self.fingerprint = loader.fingerprint
        self.keys_fingerprint = loader.keys_fingerprint

    @property
    def usage(self) -> Usage:
        """That of the loader within; see `Loader`."""
        return self._loader.usage

    def require_unchanged(self) -> None:
        """DataError where the data were written to; see `Loader`."""
        self._loader.require_unchanged()

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank from a position on, without end; see `Loader`."""
        batches = self._loader.batches(position)
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(batches, "close", lambda: None))
            for batch in batches:
                self._drop(batch)
                yield batch

    def _drop(self, batch: Batch) -> None:
        dropped = is_dropped(self._seed, batch.sample_indices, self._share)
        for row in dropped.nonzero().flatten().tolist():
            batch.captions[row] = ""
            if batch.context is not None:
                if self._empty is None:
                    raise ValueError("batches hold text states: those of the empty caption, too")
                batch.context[row] = self._empty
