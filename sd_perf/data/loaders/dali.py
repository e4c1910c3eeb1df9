"""The loader that decodes and resizes pictures by NVIDIA DALI; what it reads is the portable one's.

Each of the loader's threads has a pipeline of its own, which decodes one batch at a time. So order,
resuming and threads ahead of the step are those of `PortableLoader`, and a picture that DALI
refuses costs its batch alone: that is made by the portable loader, which names the culprit.

Where the step runs on a GPU, that GPU decodes and resizes, too, and batches never leave it.

Shape letters: B pictures, H and W rows and columns, P side of the pixels that the encoder gets.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.images import ImageRange, plain_shape
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.resize import View, geometry
from sd_perf.errors import BadSampleError, DataError
from sd_perf.files import one_line
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional

_NEED = "data.loader dali needs NVIDIA DALI", "dali"
_RANGES = {"benchmark": (0.0, 255.0), "correct": (127.5, 127.5)}
"""by data.image_range: what is subtracted from bytes, and what the rest is divided by"""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Picture:
    """What DALI is given of a picture."""

    encoded: bytes
    shape: tuple[int, int]
    """(H, W)"""
    view: View


class DaliLoader(PortableLoader):
    """Micro-batches of pixels from raw shards; a `Loader`.

    Pixels lie on the step's device. Pictures whose pixels our own rules make (transparent, of 16
    bits, with a palette) are decoded as the portable loader does. Raises ConfigError where DALI is
    not installed.
    """

    def __init__(self, config: DataConfig, options: LoaderOptions) -> None:
        optional("nvidia.dali", *_NEED)
        super().__init__(config, options)
        self._side = PIXELS_PER_LATENT * config.latent_size
        self._own = threading.local()
        self._building = threading.Lock()
        self._has_decoded = False

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Micro-batches of this rank from a position on, without end; see `Loader`."""
        with contextlib.closing(super().batches(position)) as batches:
            for batch in batches:
                if batch.pixels is not None and batch.pixels.is_cuda:
                    # Its memory is of a loader's stream, which may not use it anew before the
                    # stream of the step is through with it.
                    batch.pixels.record_stream(torch.cuda.current_stream(batch.pixels.device))
                yield batch

    def make(self, positions: np.ndarray) -> Batch:
        numbers = [self._order.sample(position) for position in positions.tolist()]
        views = self._views(positions)
        self._announce(positions, ["picture"])
        plain: dict[int, _Picture] = {}
        others: dict[int, np.ndarray] = {}
        try:
            captions = [self._reader.caption(number) for number in numbers]
            for row, (number, view) in enumerate(zip(numbers, views, strict=True)):
                encoded = self._reader.picture(number)
                if shape := plain_shape(io.BytesIO(encoded)):
                    plain[row] = _Picture(encoded, shape, view)
                elif (other := self._reader.read(number, view).pixels) is not None:
                    others[row] = other
        except BadSampleError:
            return super().make(positions)
        indices = torch.from_numpy(positions)
        indices = indices.pin_memory() if self._options.pin_memory else indices
        try:
            pixels = self._pixels(len(numbers), plain, others)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return self._make_refused(positions, error)
        return Batch(indices, None, captions, pixels=pixels)

    def _pixels(
        self, size: int, plain: dict[int, _Picture], others: dict[int, np.ndarray]
    ) -> torch.Tensor:
        """Pixels (B, 3, P, P) float32 of `size` pictures by row, complete on the step's device.

        RuntimeError where DALI refuses one of those that are `plain`.
        """
        device = self._options.device
        with self._stream() as stream:
            pixels = torch.empty(size, 3, self._side, self._side, device=device)
            for row, other in others.items():
                pixels[row].copy_(torch.from_numpy(other))
            decoded = self._decode(list(plain.values()), stream) if plain else ()
            for row, picture in zip(plain, decoded, strict=True):
                pixels[row].copy_(picture, non_blocking=True)
        if stream is not None:
            # This thread has nothing else to do; the step then needs to wait for no event.
            stream.synchronize()
        return pixels

    @contextlib.contextmanager
    def _stream(self) -> Iterator[torch.cuda.Stream | None]:
        """Run the block on this thread's stream of the step's GPU; None where that is none."""
        if self._options.device.type != "cuda":
            yield None
            return
        own = vars(self._own)
        if "stream" not in own:
            own["stream"] = torch.cuda.Stream(self._options.device)
        with torch.cuda.stream(own["stream"]):
            yield own["stream"]

    def _decode(self, pictures: list[_Picture], stream: torch.cuda.Stream | None) -> torch.Tensor:
        """Pixels (B, 3, P, P) float32, in the order of the stream.

        RuntimeError where DALI refuses one.
        """
        own = vars(self._own)
        if "pipeline" not in own:
            with self._building:
                own["pipeline"] = picture_pipeline(
                    self._options.micro_batch_size,
                    self._side,
                    self._config.image_range,
                    "cpu" if stream is None else "mixed",
                )
        # A pipeline that has failed once fails for good.
        pipeline = own.pop("pipeline")
        inputs = _inputs_of(pictures, self._side)
        with self._stopwatch.elsewhere():
            (outputs,) = pipeline.run(stream, **inputs)
        own["pipeline"] = pipeline
        self._has_decoded = True
        return torch.from_dlpack(outputs.as_tensor())

    def _make_refused(self, positions: np.ndarray, error: RuntimeError) -> Batch:
        """A batch that DALI refuses, made by the portable loader.

        DataError where that reads it all and DALI has never decoded one: then DALI fails.
        """
        batch = super().make(positions)
        if not batch.replacements:
            reason = one_line(error)
            if not self._has_decoded:
                raise DataError(
                    f"{self._index.folder}: DALI decodes none of what the portable loader does "
                    f"({reason}); set data.loader to portable"
                ) from error
            _log.warning("DALI refused a batch that can be decoded, %s: %s", batch.captions, reason)
        return batch


def _inputs_of(pictures: list[_Picture], side: int) -> dict[str, Any]:
    """What a `picture_pipeline` is run with, by name."""
    sides, corners = zip(
        *(geometry(each.shape, side, each.view.crop) for each in pictures), strict=True
    )
    return {
        "encoded": [np.frombuffer(each.encoded, np.uint8) for each in pictures],
        "sides": np.array(sides, np.float32),
        "corner": np.array(corners, np.int32),
        "flip": np.array([each.view.flip for each in pictures], np.int32),
    }


def picture_pipeline(
    batch_size: int, side: int, image_range: ImageRange, decoder: Literal["cpu", "mixed"]
) -> Any:
    """A DALI pipeline from encoded pictures to pixels (B, 3, P, P) float32.

    It is `resize_and_crop` with inputs of `geometry`: bicubic and antialiased on floats. The
    "mixed" decoder has the pictures decoded, and all else done, by the GPU that is current where
    the pipeline is built, which is when it runs first.
    """
    dali = optional("nvidia.dali", *_NEED)
    fn, types = dali.fn, dali.types
    mean, deviation = _RANGES[image_range]

    @dali.pipeline_def(batch_size=batch_size, num_threads=1, prefetch_queue_depth=1)
    def pictures() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        sides = fn.external_source(name="sides", dtype=types.FLOAT, ndim=1)
        corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
        flip = fn.external_source(name="flip", dtype=types.INT32, ndim=0)
        image = fn.decoders.image(
            encoded,
            device=decoder,
            output_type=types.RGB,
            adjust_orientation=False,
            # Of "mixed" alone: colours between pixels as the CPU makes them, and no thread tied to
            # a core, which would be the same one for the threads of all pipelines.
            jpeg_fancy_upsampling=True,
            affine=False,
        )
        image = fn.resize(
            image, size=sides, interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.FLOAT
        )
        image = fn.slice(image, start=corner, shape=(side, side), axes=(0, 1))
        return fn.crop_mirror_normalize(
            image, dtype=types.FLOAT, output_layout="CHW", mean=[mean], std=[deviation], mirror=flip
        )

    return pictures()
