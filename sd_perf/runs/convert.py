"""Converts checkpoints of the old format, torch's distributed checkpoint, to files with digests.

The old format describes its tensors in `.metadata`, a pickle, which can run any code when torch
reads it. Here it is unpickled with an allow-list that turns the known classes of metadata into
objects without behaviour, and refuses every other name.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

from sd_perf.errors import CheckpointError
from sd_perf.files import disk_errors, one_line, written_aside
from sd_perf.runs.checkpoint_files import (
    DTYPES,
    GO_BACK,
    is_old_format,
    read_json_state,
    read_state,
    write_shard,
    write_state,
)
from sd_perf.runs.checkpoints import CheckpointStore
from sd_perf.runs.folder import config_digest, draw_run_id, read_run_config
from sd_perf.runs.lock import RunLock
from sd_perf.torch_files import require_bounded

_FILE_NAME = re.compile(r"__\d+_\d+\.distcp", re.ASCII)
_MAX_METADATA_BYTES = 4 * 2**20  # that of Stable Diffusion v2 has about one megabyte
_MAX_PARTS = 32
_INSTRUCTIONS = """
PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET GLOBAL STACK_GLOBAL NONE NEWTRUE
NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE BINUNICODE EMPTY_DICT EMPTY_LIST APPEND
APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
"""
"""of a pickle that metadata is made of, beside those that are looked at"""
_KEPT = ("samples", "steps", "seed", "bad_samples", "dataset", "callbacks")
"""entries of the old `state.json` that the new one has, too"""


class _Entry:
    """Stands for an object of torch's metadata: its attributes, and nothing that can be called."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            vars(self).update(state)


def _few(parts: Any) -> Any:
    """Arguments of a call, attributes of an object, sizes of a tensor: no metadata has many."""
    if len(parts) > _MAX_PARTS:
        raise pickle.UnpicklingError(f"it has an object of {len(parts)} parts")
    return parts


_METADATA_CLASSES = (
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_ALLOWED: dict[tuple[str, str], Any] = {
    **{("torch.distributed.checkpoint.metadata", name): _Entry for name in _METADATA_CLASSES},
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Entry,
    ("torch.serialization", "_get_layout"): _Entry,
    ("pathlib", "PosixPath"): _Entry,
    ("torch", "Size"): _few,
    **{("torch", name): name for name in DTYPES},
}
"""(module, name) in the pickle -> what stands for it"""


def _codes(instructions: str) -> list[int]:
    return [getattr(pickle, name)[0] for name in instructions.split()]


class _MetadataUnpickler(pickle._Unpickler):
    """Takes time in proportion to the file, whatever stands in it.

    A pickle may hand one large object to a million calls, or fill a table with keys of one hash. So
    it is read in Python, where arguments and keys can be looked at, and by few of its instructions.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no metadata")
        return _ALLOWED[module, name]

    def _refuse(self: Any) -> None:
        raise pickle.UnpicklingError("it has an instruction that no metadata needs")

    def _call(self: Any) -> None:
        arguments = _few(self.stack.pop())
        self.stack[-1] = self.stack[-1](*arguments)

    def _set_state(self: Any) -> None:
        state = _few(self.stack.pop())
        self.stack[-1].__setstate__(state)

    def _set_item(self: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_name(key)] = value

    def _set_items(self: Any) -> None:
        pairs = self.pop_mark()
        self.stack[-1].update(zip(map(_name, pairs[::2]), pairs[1::2], strict=True))

    dispatch: ClassVar = {
        **dict.fromkeys(range(256), _refuse),
        **{code: pickle._Unpickler.dispatch[code] for code in _codes(_INSTRUCTIONS)},
        pickle.REDUCE[0]: _call,
        pickle.NEWOBJ[0]: _call,
        pickle.BUILD[0]: _set_state,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
    }


def _name(key: Any) -> str | _Entry:
    """A key whose hash the file cannot choose."""
    if not isinstance(key, (str, _Entry)):
        raise pickle.UnpicklingError(f"it has a table with a key that is {type(key).__name__}")
    return key


def convert_run(run: Path) -> Iterator[tuple[Path, Path]]:
    """Convert every checkpoint of a run that has the old format.

    Yields each converted folder and the folder that the old one was moved to. A checkpoint is held
    in memory while it is converted. Raises CheckpointError for one that cannot be read, and
    UserError where `run` is no run folder or is in use.
    """
    with RunLock() as lock:
        read_run_config(run)
        lock.take(run)
        for path in filter(is_old_format, CheckpointStore(run / "checkpoints").complete()):
            yield path, _convert(path, run)


def _convert(path: Path, run: Path) -> Path:
    """Convert one checkpoint in its place; returns where the old one was moved to."""
    old, tensors = read_json_state(path), read_old_tensors(path)
    state = {
        "run_id": draw_run_id(run),
        "config_digest": config_digest(read_run_config(run)),
        **{key: old.get(key) for key in _KEPT},
    }
    converted = path.with_name(f"converted_{path.name}")
    kept = path.with_name(f"old_format_{path.name}")
    with disk_errors(converted, "make room, then convert again"):
        with written_aside(converted) as draft:
            draft.mkdir()
            write_state(draft, state, write_shard(draft, tensors))
            read_state(draft)  # the old one is moved only for a good one
        path.rename(kept)
        converted.rename(path)
    return kept


def read_old_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of the old format, by name.

    Raises CheckpointError where it is damaged or hostile. No name in `.metadata` is called or
    imported but those of the allow-list, and no file outside the folder is opened.
    """
    try:
        metadata = _read_metadata(path / ".metadata")
        return {
            index.fqn: _read_tensor(path, info, metadata.state_dict_metadata[index.fqn])
            for index, info in metadata.storage_data.items()
        }
    except CheckpointError:
        raise
    except Exception as error:  # what a damaged pickle raises is not limited to a few kinds
        raise CheckpointError(
            f"{path}: cannot be converted ({one_line(error)}); {GO_BACK}"
        ) from error


def _read_metadata(file: Path) -> Any:
    if not file.is_file() or file.stat().st_size > _MAX_METADATA_BYTES:
        raise ValueError(f".metadata is no file of at most {_MAX_METADATA_BYTES} bytes")
    return _MetadataUnpickler(io.BytesIO(file.read_bytes())).load()


def _read_tensor(path: Path, info: Any, described: Any) -> torch.Tensor:
    """One tensor, which is a zip file of torch's at an offset in one of the checkpoint's files."""
    name, offset, length = info.relative_path, info.offset, info.length
    file = path / str(name)
    if not (isinstance(name, str) and _FILE_NAME.fullmatch(name)) or file.is_symlink():
        raise ValueError(f".metadata names the file {str(name)[:60]!r}, which is not the format's")
    if not 0 <= offset <= offset + length <= file.stat().st_size:
        raise ValueError(f"{name} is truncated")
    with file.open("rb") as stream:
        stream.seek(offset)
        stored = io.BytesIO(stream.read(length))
    require_bounded(stored)
    tensor = torch.load(stored, "cpu", weights_only=True)
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != described.size:
        raise ValueError(f"a tensor in {name} is not as .metadata says")
    return tensor.contiguous()
