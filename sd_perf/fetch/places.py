"""Where a source has the files of an artefact, and which digests are published there."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urljoin, urlsplit

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import Artefact, File, digests_listed
from sd_perf.fetch.web import Refused, Transient, Web, short
from sd_perf.files import read_untrusted

_MAX_SUMS = 2**22
"""bytes of a list of digests, at most"""


@dataclass(frozen=True)
class Place:
    """A file, and where one source has it."""

    file: File
    """with the digests that are published there, too"""
    where: str | Path
    """URL, or a path on this machine"""


def locate(artefact: Artefact, source: str | Path, web: Web, *, named: bool) -> list[Place]:
    """The files of an artefact at a source: a URL or a path, see `sources.yaml`.

    `named`: whether the user named the source, which then has files under their own names. Raises
    Refused where the source has them not all, or does not answer.
    """
    if isinstance(source, Path):
        return _on_this_machine(artefact, source)
    if urlsplit(source).path.endswith(".uri"):
        return _in_listed_folder(artefact, source, web)
    if source.endswith("/"):
        sums = _sums_at(artefact, source, web)
        return [
            Place(_with(file, sums), source + quote(file.name if named else file.path or file.name))
            for file in artefact.files
        ]
    return [Place(_only_file(artefact, source), source)]


def origin(text: str) -> str | Path:
    """What --from names: a URL of http or https, or a path on this machine; else UserError."""
    if text and "://" not in text:
        return Path(text)
    try:
        parts = urlsplit(text)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        if fits and parts.username is not None:
            raise UserError("--from: names and passwords in a URL are not sent; use one without")
    except ValueError:
        fits = False
    if not fits:
        raise UserError(f"--from {text!r} is neither a path nor a URL of https:// or http://")
    return text


def _in_listed_folder(artefact: Artefact, url: str, web: Web) -> list[Place]:
    """MLCommons' storage: NAME.uri holds the folder's URL, NAME.md5 beside it the list of files."""
    base = _text(web, url, 2**12).strip()
    parts, own = urlsplit(base), urlsplit(url)
    if parts.scheme != own.scheme or not parts.hostname or len(base.split()) != 1:
        raise Refused(f"{url} holds no URL of {own.scheme}://")
    listed = own._replace(path=own.path.removesuffix(".uri") + ".md5").geturl()
    digests = _listed(_text(web, listed, _MAX_SUMS), listed)
    known = {file.name: file for file in artefact.files}
    _require_all(artefact, listed, digests)
    folder = base.rstrip("/") + "/"
    return [
        Place(_with(known.get(name, File(name)), digests), folder + quote(name))
        for name in sorted(digests)
    ]


def _on_this_machine(artefact: Artefact, path: Path) -> list[Place]:
    if not path.is_dir():
        return [Place(_only_file(artefact, path.name), path)]
    sums_path = path / artefact.sums
    sums = {}
    if artefact.sums and sums_path.exists():
        text = read_untrusted(sums_path, _MAX_SUMS).decode(errors="replace")
        sums = _listed(text, str(sums_path))
    _require_all(artefact, str(path), {f.name for f in artefact.files if (path / f.name).exists()})
    return [Place(_with(file, sums), path / file.name) for file in artefact.files]


def _only_file(artefact: Artefact, named: str) -> File:
    """The one file of an artefact; Refused where it has several, one of which is named."""
    if len(artefact.files) == 1:
        return artefact.files[0]
    name = PurePosixPath(unquote(urlsplit(named).path)).name
    raise Refused(
        f"{name} is one file, and {artefact.name} has {len(artefact.files)}; name their folder, "
        "with a slash at the end where it is a URL"
    )


def _sums_at(artefact: Artefact, folder: str, web: Web) -> dict[str, dict[str, str]]:
    """Digests in the list that lies beside the files; none where there is no such list."""
    if not artefact.sums:
        return {}
    url = urljoin(folder, artefact.sums)
    try:
        return _listed(_text(web, url, _MAX_SUMS), url)
    except Refused:
        return {}


def _text(web: Web, url: str, limit: int) -> str:
    """The text at a URL, asked for again as a file is; Refused names the URL."""
    for failures in itertools.count(1):
        try:
            try:
                return web.text(url, limit)
            except Transient as fault:
                web.wait_after(fault, url, failures)
        except Refused as refusal:
            raise Refused(f"{short(url)}: {refusal}") from refusal
    raise AssertionError("wait_after ends this")


def _listed(text: str, where: str) -> dict[str, dict[str, str]]:
    try:
        return digests_listed(text, where)
    except UserError as error:
        raise Refused(str(error)) from error


def _require_all(artefact: Artefact, where: str, names: object) -> None:
    lacking = [file.name for file in artefact.files if file.name not in names]  # type: ignore[operator]
    if lacking:
        count = f"{len(lacking)} of the {len(artefact.files)} files of {artefact.name}"
        raise Refused(f"{where} lacks {count}, such as {lacking[0]}")


def _with(file: File, sums: dict[str, dict[str, str]]) -> File:
    """A file with the digests of a list, too; its own are stronger."""
    return dataclasses.replace(file, digests=sums.get(file.name, {}) | file.digests)
