"""The loader that decodes and resizes pictures by NVIDIA DALI; what it reads is the portable one's.

Each of the loader's threads has a pipeline of its own, which decodes one batch at a time. So order,
resuming and threads ahead of the step are those of `PortableLoader`, and a picture that DALI
refuses costs its batch alone: that is made by the portable loader, which names the culprit.

Shape letters: B pictures, H and W rows and columns, P side of the pixels that the encoder gets.
"""

from __future__ import annotations

import io
import logging
import threading
from typing import Any

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.images import has_plain_pixels
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.errors import BadSampleError, DataError
from sd_perf.files import one_line
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional

_RANGES = {"benchmark": (0.0, 255.0), "correct": (127.5, 127.5)}
"""by data.image_range: what is subtracted from bytes, and what the rest is divided by"""

_log = logging.getLogger(__name__)


class DaliLoader(PortableLoader):
    """Micro-batches of pixels from raw shards; a `Loader`.

    Pictures whose pixels our own rules make (transparent, of 16 bits, with a palette) are decoded
    as the portable loader does. Raises ConfigError where DALI is not installed.
    """

    def __init__(self, config: DataConfig, options: LoaderOptions) -> None:
        optional("nvidia.dali", "data.loader dali needs NVIDIA DALI", "dali")
        super().__init__(config, options)
        self._own = threading.local()
        self._building = threading.Lock()
        self._has_decoded = False

    def make(self, positions: np.ndarray) -> Batch:
        numbers = [self._order.sample(position) for position in positions.tolist()]
        batch = Batch.empty(positions, self._config, self._options)
        assert batch.pixels is not None
        self._announce(positions, ["picture"])
        try:
            batch.captions += map(self._reader.caption, numbers)
            pictures = [self._reader.picture(number) for number in numbers]
            plain = [has_plain_pixels(io.BytesIO(picture)) for picture in pictures]
            for row in np.flatnonzero(~np.array(plain)):
                batch.pixels[row] = torch.from_numpy(self._reader.read(numbers[row]).pixels)
        except BadSampleError:
            return super().make(positions)
        encoded = [picture for picture, is_plain in zip(pictures, plain, strict=True) if is_plain]
        try:
            decoded = self._decode(encoded) if encoded else ()
        except RuntimeError as error:
            return self._make_refused(positions, error)
        for row, pixels in zip(np.flatnonzero(plain), decoded, strict=True):
            batch.pixels.numpy()[row] = pixels.numpy()
        return batch

    def _decode(self, pictures: list[bytes]) -> torch.Tensor:
        """Pixels (B, 3, P, P) float32 of encoded pictures, valid until this thread's next call.

        RuntimeError where DALI refuses one.
        """
        own = vars(self._own)
        if "pipeline" not in own:
            with self._building:
                own["pipeline"] = _pipeline(self._config, self._options)
        # A pipeline that has failed once fails for good.
        pipeline = own.pop("pipeline")
        pipeline.feed_input("encoded", [np.frombuffer(each, np.uint8) for each in pictures])
        with self._stopwatch.elsewhere():
            (outputs,) = pipeline.run()
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


def _pipeline(config: DataConfig, options: LoaderOptions) -> Any:
    """A pipeline from encoded pictures to pixels (B, 3, P, P) float32, on the CPU.

    It is `resize_and_crop`: shorter side to P, bicubic and antialiased on floats, the longer side
    rounded down; the centre, at half the surplus rounded to even.
    """
    from nvidia.dali import fn, math, pipeline_def, types

    size = PIXELS_PER_LATENT * config.latent_size
    mean, deviation = _RANGES[config.image_range]

    @pipeline_def(
        batch_size=options.micro_batch_size,
        num_threads=1,
        device_id=None,
        exec_pipelined=False,
        exec_async=False,
    )
    def pictures() -> Any:
        encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        shape = fn.peek_image_shape(encoded, adjust_orientation=False, dtype=types.INT64)
        short = math.min(shape[0], shape[1])
        sides = [shape[axis] * size // short for axis in (0, 1)]
        surplus = [side - size for side in sides]
        begin = fn.stack(*(each // 2 + ((each & 3) == 3) for each in surplus))
        image = fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False)
        image = fn.resize(
            image,
            size=fn.cast(fn.stack(*sides), dtype=types.FLOAT),
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            dtype=types.FLOAT,
        )
        image = fn.slice(
            image, start=fn.cast(begin, dtype=types.INT32), shape=(size, size), axes=(0, 1)
        )
        return fn.crop_mirror_normalize(
            image, dtype=types.FLOAT, output_layout="CHW", mean=[mean], std=[deviation]
        )

    pipeline = pictures()
    pipeline.build()
    return pipeline
