"""The files of one checkpoint: tensors as safetensors, everything else in `state.json`.

A checkpoint folder holds one file `<component>_<rank>_of_<count>.safetensors` per component
("model", "exp_avg", "exp_avg_sq", "ema", "precision_state") and rank that wrote. A tensor is named
`<component>.<name>`. It lies whole in one file, or in pieces in several: those of ranks that each
hold a part of the optimizer's state. `state.json` has the state of training, the size and SHA-256
of every file, shape, dtype and place of every tensor, and the SHA-256 of itself. Nothing is ever
unpickled, and no file outside the folder is ever opened.

Format 1 has no pieces; all else is the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import stat
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sd_perf.commands import sd_perf_command
from sd_perf.errors import CheckpointError
from sd_perf.files import is_absent, one_line, parse_json, quoted, read_untrusted, write_json

GO_BACK = "move this checkpoint away to go back to an older one"
"""advice where a checkpoint cannot be read"""
FORMAT = 2
"""number of the format described above"""
READABLE = (1, 2)
"""formats that can be read"""
STATE_NAME = "state.json"
POSITION = re.compile(r"samples_(\d{10})", re.ASCII)
"""name of a checkpoint folder; the group is its position in samples"""
_FILE_NAME = re.compile(r"\w+_\d{5}_of_\d{5}\.safetensors", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_STATE_BYTES = 64 * 2**20  # that of Stable Diffusion v2 has half a megabyte
DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool")
"""of tensors in a checkpoint"""


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor from `begin` on, in the order in which they lie in memory."""

    values: torch.Tensor
    """(n,)"""
    begin: int
    shape: tuple[int, ...]
    """of the whole tensor"""
    order: tuple[int, ...]
    """axes of the whole tensor from the one with the longest steps in memory to the shortest"""

    @classmethod
    def of(cls, whole: torch.Tensor, values: torch.Tensor, begin: int) -> Piece:
        """A piece of a tensor that has the shape and memory order of the dense tensor `whole`."""
        strides = whole.stride()
        order = sorted(range(whole.dim()), key=lambda axis: -strides[axis])
        return cls(values, begin, tuple(whole.shape), tuple(order))


def write_shard(
    folder: Path, tensors: Mapping[str, torch.Tensor | Piece], rank: int = 0, count: int = 1
) -> dict[str, dict[str, Any]]:
    """Write the tensors and pieces that one of `count` ranks holds, on the CPU.

    Returns the entries `files` and `tensors` that `write_state` takes.
    """
    components: dict[str, dict[str, torch.Tensor | Piece]] = defaultdict(dict)
    for name, tensor in tensors.items():
        components[name.partition(".")[0]][name] = tensor
    files, described = {}, {}
    for component, part in components.items():
        file = folder / f"{component}_{rank:05d}_of_{count:05d}.safetensors"
        values = {
            name: (some.values if isinstance(some, Piece) else some).contiguous()
            for name, some in part.items()
        }
        save_file(values, file)
        file.chmod(0o644)  # the library makes it readable for its owner alone
        files[file.name] = {"size": file.stat().st_size, "sha256": _file_digest(file)}
        for name, some in part.items():
            described[name] = _entry(file.name, some)
    return {"files": files, "tensors": described}


def _entry(file: str, some: torch.Tensor | Piece) -> dict[str, Any]:
    """The entry of a tensor in `state.json`; of a piece, as if there were no other."""
    if not isinstance(some, Piece):
        return {"file": file, **_describe(some)}
    piece = {"file": file, "begin": some.begin, "end": some.begin + some.values.numel()}
    described = {**_describe(some.values), "shape": list(some.shape), "order": list(some.order)}
    return {**described, "pieces": [piece]}


def _joined(shards: Iterable[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The entries of all ranks' tensors, with the pieces of each tensor in one entry."""
    joined: dict[str, dict[str, Any]] = {}
    for shard in shards:
        for name, entry in shard["tensors"].items():
            if "pieces" in entry and name in joined:
                joined[name]["pieces"] += entry["pieces"]
            else:
                joined[name] = dict(entry)
    return joined


def write_state(
    folder: Path, state: Mapping[str, Any], *shards: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write `state.json`: the state of training, and what `write_shard` returned on each rank."""
    entries = {
        "format": FORMAT,
        **state,
        "files": {name: entry for shard in shards for name, entry in shard["files"].items()},
        "tensors": _joined(shards),
    }
    write_json(folder / STATE_NAME, {**entries, "sha256": state_digest(entries)})


def state_digest(entries: Mapping[str, Any]) -> str:
    """SHA-256 of `state.json` without its own entry `sha256`, as compact JSON with sorted keys."""
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder, every entry checked but what `callbacks` hold.

    Raises CheckpointError where it is missing, damaged, or of another format.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    state = read_json_state(path)
    if "format" not in state and is_old_format(path):
        raise CheckpointError(
            f"{path}: has the old format, which is a pickle; convert it with "
            f"`{sd_perf_command('convert-checkpoints', run_folder_of(path))}`"
        )
    own = state.pop("sha256", None)
    if own != state_digest(state):
        raise CheckpointError(f"{path}: damaged (state.json: not what was written); {GO_BACK}")
    if state.get("format") not in READABLE:
        raise CheckpointError(
            f"{path}: has format {quoted(state.get('format'), limit=60)}, and this version of "
            f"sd-perf reads formats up to {FORMAT}; read it with the version that wrote it"
        )
    if fault := _fault(state, path.name):
        raise CheckpointError(f"{path}: cannot be used (state.json: {fault}); {GO_BACK}")
    return state


def run_folder_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint folder lies in: by its name, or where a link to it leads."""
    named = checkpoint.absolute().parent.parent
    if (named / "run_manifest.json").exists():
        return named
    return checkpoint.resolve().parent.parent


def read_json_state(path: Path) -> dict[str, Any]:
    """`state.json` of either format, not checked; CheckpointError where it is no JSON object."""
    file = path / STATE_NAME
    if is_absent(file):
        raise CheckpointError(f"{path}: not a checkpoint of sd-perf (no state.json); {GO_BACK}")
    content = read_untrusted(file, _MAX_STATE_BYTES, remedy=GO_BACK, kind=CheckpointError)
    try:
        state = parse_json(content)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of sd-perf (state.json: {one_line(error)}); {GO_BACK}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: not a checkpoint of sd-perf (state.json holds no entries); {GO_BACK}"
        )
    return state


def is_old_format(path: Path) -> bool:
    """Whether a folder is a checkpoint as torch.distributed.checkpoint writes it."""
    return (path / ".metadata").exists()


def read_tensors(path: Path, state: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    """The named tensors on the CPU; all digests of their files are checked before one is read.

    `state` is what `read_state` gives. Raises CheckpointError where a file is damaged.
    """
    by_file: dict[str, list[str]] = defaultdict(list)
    for name in names:
        for piece in _pieces(state["tensors"][name]):
            by_file[piece["file"]].append(name)
    for file in by_file:
        _check_file(path / file, state["files"][file])
    stored = {file: _read_file(path / file, state, wanted) for file, wanted in by_file.items()}
    tensors = {}
    for name in names:
        entry = state["tensors"][name]
        if "file" in entry:
            tensors[name] = stored[entry["file"]].pop(name)
        else:
            values = [stored[piece["file"]].pop(name) for piece in _pieces(entry)]
            tensors[name] = _assembled(entry, torch.cat(values))
    return tensors


def _pieces(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The places of a tensor's elements, in order; one without limits for a whole tensor."""
    return (
        sorted(entry["pieces"], key=lambda piece: piece["begin"]) if "pieces" in entry else [entry]
    )


def _assembled(entry: Mapping[str, Any], values: torch.Tensor) -> torch.Tensor:
    """The whole tensor of an entry from all its elements (n,) in memory order."""
    shape, order = entry["shape"], entry["order"]
    in_order = values.view([shape[axis] for axis in order])
    return in_order.permute([order.index(axis) for axis in range(len(order))])


def _check_file(file: Path, entry: Mapping[str, Any]) -> None:
    """CheckpointError where a file has not the size and digest of its entry in `state.json`."""
    try:
        status = file.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file}: is no regular file; {GO_BACK}")
        if status.st_size < entry["size"]:
            raise CheckpointError(
                f"{file}: truncated ({status.st_size} of {entry['size']} bytes); {GO_BACK}"
            )
        if status.st_size > entry["size"] or _file_digest(file) != entry["sha256"]:
            raise CheckpointError(
                f"{file}: damaged (its bytes are not those that were written); {GO_BACK}"
            )
    except OSError as error:
        why = error.strerror or one_line(error)
        raise CheckpointError(f"{file}: cannot be read ({why}); {GO_BACK}") from error


def _read_file(file: Path, state: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: damaged ({one_line(error)}); {GO_BACK}") from error
    for name, tensor in tensors.items():
        if _describe(tensor) != _expected(state["tensors"][name], file.name):
            raise CheckpointError(
                f"{file}: {quoted(name, limit=60)} is not as state.json says; {GO_BACK}"
            )
    return tensors


def _expected(entry: Mapping[str, Any], file: str) -> dict[str, Any]:
    """Shape and dtype of what a file must hold of a tensor."""
    shape = entry["shape"]
    if "pieces" in entry:
        piece = next(piece for piece in entry["pieces"] if piece["file"] == file)
        shape = [piece["end"] - piece["begin"]]
    return {"shape": shape, "dtype": entry["dtype"]}


def _describe(tensor: torch.Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fault(state: Mapping[str, Any], folder_name: str) -> str:
    """The first entry of `state.json` that is not as it must be, in words; empty where all are."""
    for key, (right, words) in _SCHEMA.items():
        if key not in state:
            return f"{key} is missing"
        if not right(state[key]):
            return f"{key} is {quoted(state[key], limit=60)}, not {words}"
    if unknown := sorted(state.keys() - _SCHEMA.keys()):
        return f"{quoted(unknown[0], limit=60)} is unknown"
    position = POSITION.fullmatch(folder_name)
    if position and int(position[1]) != state["samples"]:
        return f"samples is {state['samples']}, not what the folder's name says"
    for name, entry in state["tensors"].items():
        if any(piece["file"] not in state["files"] for piece in _pieces(entry)):
            return f"{quoted(name, limit=60)} lies in a file that is not listed"
        if "pieces" in entry and not _is_covered(entry):
            return f"the pieces of {quoted(name, limit=60)} do not make it up"
    return ""


def _is_covered(entry: Mapping[str, Any]) -> bool:
    """Whether the pieces, each in a file of its own, hold every element once."""
    position, pieces = 0, _pieces(entry)
    for piece in pieces:
        if piece["begin"] != position or piece["end"] <= position:
            return False
        position = piece["end"]
    one_each = len({piece["file"] for piece in pieces}) == len(pieces)
    whole = position == math.prod(entry["shape"])
    return one_each and whole and sorted(entry["order"]) == list(range(len(entry["shape"])))


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # bool is an int, too


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _FILE_NAME.fullmatch(name)
        and isinstance(entry, dict)
        and entry.keys() == {"size", "sha256"}
        and _is_whole(entry["size"])
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"])
        for name, entry in value.items()
    )


def _are_tensors(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and (_has_file(entry) if "file" in entry else _has_pieces(entry))
        and _are_whole(entry["shape"])
        and entry["dtype"] in DTYPES
        for entry in value.values()
    )


def _has_file(entry: Mapping[str, Any]) -> bool:
    return entry.keys() == {"file", "shape", "dtype"} and isinstance(entry["file"], str)


def _has_pieces(entry: Mapping[str, Any]) -> bool:
    return (
        entry.keys() == {"pieces", "order", "shape", "dtype"}
        and _are_whole(entry["order"])
        and isinstance(entry["pieces"], list)
        and all(
            isinstance(piece, dict)
            and piece.keys() == {"file", "begin", "end"}
            and isinstance(piece["file"], str)
            and _are_whole([piece["begin"], piece["end"]])
            for piece in entry["pieces"]
        )
    )


def _are_whole(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_whole, value))


_WHOLE = (_is_whole, "a whole number from 0")
_TEXT = (_is_text, "a short text")
_OBJECT = (_is_object, "an object")
_SCHEMA = {
    "format": _WHOLE,
    "run_id": _TEXT,
    "config_digest": _TEXT,
    "samples": _WHOLE,
    "steps": _WHOLE,
    "seed": _WHOLE,
    "bad_samples": _WHOLE,
    "dataset": _OBJECT,
    "callbacks": (
        lambda value: isinstance(value, dict) and all(map(_is_object, value.values())),
        "an object of objects",
    ),
    "files": (_are_files, "sizes and digests of files in the folder"),
    "tensors": (_are_tensors, "place, shape and dtype of tensors"),
}
"""key of `state.json` -> whether a value is right, and what is right in words"""
