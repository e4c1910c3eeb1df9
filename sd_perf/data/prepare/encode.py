"""Encodes shards of pictures or of moments, a shard at a time, into encoded shards.

Shape letters: B samples or captions, C latent channels, S latent side, T text tokens, D context
channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from sd_perf.config import Config
from sd_perf.data.encoded import Array, Layout, new_layout, read_layout, scan_encoded
from sd_perf.data.formats import FORMATS
from sd_perf.data.prepare.rounding import Encoded, RoundingError
from sd_perf.data.samples import Sample, SampleReader
from sd_perf.data.shards import ShardIndex, find_shards, scan_shard
from sd_perf.data.threads import map_ahead
from sd_perf.errors import BadSampleError, DataError
from sd_perf.files import disk_errors, is_absent, quoted, written_aside
from sd_perf.models.build import build_image_encoder, build_text_encoder

SourceFormat = Literal["raw", "moments"]
_CAPTIONS_AT_ONCE = 64
"""captions per call of the text tower"""
_BATCHES_AHEAD = 2
"""batches that are read while one is encoded"""

_log = logging.getLogger(__name__)


class ShardEncoder:
    """Encodes the shards of a folder into data.path, as the config will read them.

    One encoded shard is made of each, with its name, keys and order. A sample that cannot be
    encoded keeps its place, with moments of NaN: training then replaces it by the same successor
    as training on the source does. `total` adds up what was found in the shards so far.
    """

    def __init__(
        self,
        config: Config,
        source: Path,
        source_format: SourceFormat,
        *,
        copy_text: bool,
        device: torch.device,
        batch_size: int = 8,
    ) -> None:
        """`copy_text` takes text states from the source in place of encoding captions."""
        data, model = config.data, config.model
        data.require(data.format == "encoded", "format", "encoded, the format that is written")
        has_context = data.context == "precomputed"
        self.copies_text = copy_text and has_context
        if self.copies_text and source_format == "raw":
            raise DataError(f"{source}: raw shards hold no text states; take --text encode")
        self.paths = find_shards(source, source_format)
        self.config, self.device, self.batch_size = config, device, batch_size
        self.moments_shape = 2 * model.in_channels, data.latent_size, data.latent_size
        self.context_shape = (data.context_tokens, model.context_dim) if has_context else None
        context: Literal["precomputed", "open_clip"]
        context = "precomputed" if self.copies_text else "open_clip"
        self.source = replace(data, format=source_format, path=str(source), context=context)
        self._images = build_image_encoder(config, device) if source_format == "raw" else None
        self._text: Callable[[list[str]], torch.Tensor] | None = None
        if has_context and not self.copies_text:
            self._text = build_text_encoder(config, device)
        self.recipe = self._recipe()
        self.total = Encoded()

    def _recipe(self) -> dict[str, Any]:
        """What is encoded by what; see `Layout.recipe`."""
        data, text = self.config.data, self.config.text_encoder
        recipe: dict[str, Any] = {"source": self.source.format, "moments": [*self.moments_shape]}
        if self._images is not None:
            recipe |= {"image_range": data.image_range, "autoencoder": Path(data.autoencoder).name}
        if self.context_shape is not None:
            recipe["context"] = [*self.context_shape]
            recipe["text"] = f"{text.model} {Path(text.weights).name}" if self._text else "copied"
        return recipe

    def run(self, rank: int = 0, size: int = 1) -> None:
        """Encode the shards of one of `size` processes, without those that have been encoded.

        Raises DataError for more bad samples in them than data.max_bad_samples.
        """
        numbers = range(rank, len(self.paths), size)
        for place, number in enumerate(numbers, 1):
            found = self._done(number) or self._encode(number)
            self.total.merge(found)
            self._stop_past_limit(self.total.bad, str(self.target(number)))
            _log.info("%d of %d shards encoded: %s", place, len(numbers), self.target(number))

    def target(self, number: int) -> Path:
        """The encoded shard made of the source's shard of this number."""
        return Path(self.config.data.path) / f"{self.paths[number].stem}{FORMATS['encoded'].suffix}"

    def missing(self) -> int:
        """Shards of the set that have not been encoded yet, by any process."""
        return sum(is_absent(self.target(number)) for number in range(len(self.paths)))

    def _done(self, number: int) -> Encoded | None:
        """What was found in a shard that has been encoded; None where it has not.

        DataError for a file of its name that is none, or one that was encoded otherwise.
        """
        path, target = self.paths[number], self.target(number)
        if is_absent(target):
            return None
        layout = read_layout(target)
        place = {"shard": layout.shard, "shards": layout.shards, **layout.recipe}
        here = {"shard": number, "shards": len(self.paths), **self.recipe}
        if place != here:
            name = next(name for name in {**here, **place} if place.get(name) != here.get(name))
            was, now = quoted(place.get(name)), quoted(here.get(name))
            raise DataError(
                f"{target}: was encoded otherwise ({name} {was}, here {now}); encode into another "
                "folder, or move these shards away"
            )
        keys = scan_encoded(target, number)["key"], scan_shard(path, 0, self.source.format)["key"]
        if not np.array_equal(*keys):
            raise DataError(
                f"{target}: holds other samples than {path}; encode into another folder, or move "
                "the shard away"
            )
        try:
            return Encoded.of(layout.facts)
        except ValueError as error:
            raise DataError(f"{target} is damaged ({error}); remove it and encode again") from error

    def _encode(self, number: int) -> Encoded:
        """Encode one shard: its file is whole or absent."""
        path, target, model = self.paths[number], self.target(number), self.config.model
        rows = scan_shard(path, 0, self.source.format)
        if self.copies_text and (rows["context_size"] == 0).any():
            raise DataError(f"{path}: holds samples without text states; take --text encode")
        index = ShardIndex(path.parent, [path.name], rows, self.source.format)
        reader = SampleReader(index, self.source, model.in_channels, model.context_dim)
        with disk_errors(target, "make room, or choose another data.path", DataError):
            target.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(target) as draft, draft.open("wb") as file:
                return self._write(file, number, index, reader)

    def _write(
        self, file: BinaryIO, number: int, index: ShardIndex, reader: SampleReader
    ) -> Encoded:
        """All of a shard; its header last, so that an unfinished file is no shard."""
        captions = [_caption(reader, sample) for sample in range(len(index))]
        texts = {text: row for row, text in enumerate(dict.fromkeys(captions))}
        context = None if self.context_shape is None else (len(texts), *self.context_shape)
        keys, bytes_of = index.samples["key"], [caption.encode() for caption in captions]
        layout = new_layout(keys.tolist(), bytes_of, self.moments_shape, context)
        arrays, found = layout.arrays, Encoded(samples=len(index))
        _put(file, arrays["caption_ends"], 0, np.cumsum([len(c) for c in bytes_of], dtype="<i8"))
        _put(file, arrays["keys"], 0, keys.astype(f"S{arrays['keys'].shape[1]}"))
        _put(file, arrays["captions"], 0, np.frombuffer(b"".join(bytes_of), "|u1"))
        if context is not None:
            _put(file, arrays["states"], 0, np.array([texts[c] for c in captions], "<i8"))
        ahead = _BATCHES_AHEAD * self.batch_size
        read = map_ahead(partial(_read, reader), range(len(index)), self.source.workers, ahead)
        with closing(read) as results:
            for start in range(0, len(index), self.batch_size):
                samples = list(islice(results, self.batch_size))
                self._write_moments(file, arrays["moments"], start, samples, index, found)
                self._copy_texts(file, arrays.get("context"), samples, texts, found)
        if self._text is not None:
            self._encode_texts(file, arrays["context"], list(texts), found)
        layout = Layout(arrays, number, len(self.paths), self.recipe, asdict(found))
        file.seek(0)
        file.write(layout.header())
        return found

    def _write_moments(
        self,
        file: BinaryIO,
        place: Array,
        start: int,
        samples: Sequence[Sample | BadSampleError],
        index: ShardIndex,
        found: Encoded,
    ) -> None:
        """The moments of consecutive samples from number `start` on; NaN for bad ones."""
        reasons = {i: str(bad) for i, bad in enumerate(samples) if isinstance(bad, BadSampleError)}
        moments = np.full((len(samples), *self.moments_shape), np.nan, np.float32)
        good = [i for i in range(len(samples)) if i not in reasons]
        if good:
            moments[good] = self._moments_of([samples[i] for i in good])
        for i in good:
            if not (np.abs(moments[i]) <= np.finfo(np.float16).max).all():
                reasons[i], moments[i] = "its moments are beyond what float16 holds", np.nan
        for i, reason in reasons.items():
            name = f"{index.folder}: sample {index.name(start + i)}: {reason}"
            _log.warning("%s", name)
            found.bad += 1
            self._stop_past_limit(self.total.bad + found.bad, name)
        kept = [i for i in good if i not in reasons]
        halves = moments.astype("<f2")
        found.moments.add(moments[kept], halves[kept])
        _put(file, place, start, halves)

    def _moments_of(self, samples: Sequence[Any]) -> np.ndarray:
        """Moments (B, 2C, S, S) float32 of good samples, in float32 arithmetic."""
        if self._images is None:
            return np.stack([sample.moments for sample in samples])
        pixels = torch.from_numpy(np.stack([sample.pixels for sample in samples]))
        return self._images(pixels.to(self.device)).cpu().numpy()

    def _copy_texts(
        self,
        file: BinaryIO,
        place: Array | None,
        samples: Sequence[Sample | BadSampleError],
        rows: dict[str, int],
        found: Encoded,
    ) -> None:
        """The samples' own text states, in the rows of their captions, which are taken out."""
        for sample in samples:
            if isinstance(sample, BadSampleError) or sample.context is None or place is None:
                continue
            if (row := rows.pop(sample.caption, None)) is not None:
                _put(file, place, row, _rounded(sample.context, found.context))

    def _encode_texts(self, file: BinaryIO, place: Array, texts: list[str], found: Encoded) -> None:
        """The text states of captions, each once."""
        assert self._text is not None
        for start in range(0, len(texts), _CAPTIONS_AT_ONCE):
            states = self._text(texts[start : start + _CAPTIONS_AT_ONCE]).cpu().numpy()
            right = f"{states.shape[1]}, the tokens of {self.config.text_encoder.model}"
            same = states.shape[1:] == place.shape[1:]
            self.config.data.require(same, "context_tokens", right)
            _put(file, place, start, _rounded(states, found.context))

    def _stop_past_limit(self, bad: int, last: str) -> None:
        limit = self.config.data.max_bad_samples
        if bad > limit:
            raise DataError(
                f"{bad} samples cannot be encoded, more than data.max_bad_samples ({limit}), the "
                f"last: {last}; mend them, or allow as many"
            )


def _read(reader: SampleReader, number: int) -> Sample | BadSampleError:
    try:
        return reader.read(number)
    except BadSampleError as error:
        return error


def _caption(reader: SampleReader, number: int) -> str:
    """The caption of a sample; empty where it cannot be used, which reading all of it tells."""
    try:
        return reader.caption(number)
    except BadSampleError:
        return ""


def _rounded(exact: np.ndarray, error: RoundingError) -> np.ndarray:
    """Text states in float16, which holds all that LayerNorm leaves."""
    halves = exact.astype("<f2")
    error.add(exact, halves)
    return halves


def _put(file: BinaryIO, place: Array, row: int, values: np.ndarray) -> None:
    """Write rows of an array from row number `row` on."""
    file.seek(place.offset + row * place.row_bytes)
    file.write(np.ascontiguousarray(values).tobytes())
