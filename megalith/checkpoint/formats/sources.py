"""Where weights are read from: a path, an archive or a URL; the last two become a folder in a cache."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from typing import Any

from megalith.common import files
from megalith.common.errors import CheckpointError, problem
from megalith.common.locks import locked
from megalith.common.units import size as size_text

TRIES, PIECE, PATIENCE = 5, 1 << 20, 60.0  # attempts without progress, bytes at a time, seconds without an answer
WAIT = "Wait for it: what it fetches is then here"
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)  # trying again does not cure them
Tell = Callable[[str], None]


def local(source: str | os.PathLike, *, sha256: str | None = None, tell: Tell = print) -> pathlib.Path:
    """A path on this machine: that of `source`; a URL is downloaded, a zip archive unpacked, both in the cache where they stay.

    sha256: what the file must have; that of a download is told in any case.
    Raises CheckpointError where the file cannot be had or has another checksum.
    """
    text = os.fspath(source)
    path = (
        download(text, cache() / hashlib.sha256(text.encode()).hexdigest()[:16], tell)
        if is_url(text)
        else pathlib.Path(source)
    )
    if path.is_file() and (is_url(text) or sha256):
        check(path, sha256, tell)
    return unpack(path, tell) if is_archive(path) else path


def is_url(source: str | os.PathLike) -> bool:
    """Whether a source is an address and no path."""
    return re.match(r"https?://", os.fspath(source)) is not None


def cache() -> pathlib.Path:
    """MEGALITH_CACHE, or megalith/ in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get("MEGALITH_CACHE") or pathlib.Path(base) / "megalith")


def check(path: pathlib.Path, wanted: str | None, tell: Tell) -> None:
    """Tell a file's checksum and compare it with the one wanted."""
    found = files.sha256(path)
    tell(f"{path}: sha256 {found}")
    if wanted and wanted.lower() != found:
        cure = f"Delete {path} and try again; if it stays, the publisher's file has changed"
        raise CheckpointError(problem(f"{path}: sha256", found, f"--sha256 says {wanted}", cure))


def is_archive(path: pathlib.Path) -> bool:
    """A zip archive, but not one that torch.save made."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return not any(name.endswith("data.pkl") for name in archive.namelist())


def unpack(path: pathlib.Path, tell: Tell) -> pathlib.Path:
    """The folder with an archive's contents; unpacked once, anew where the archive has changed."""
    facts = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache() / f"{path.stem}-{key}"
    if not _is_whole(path, target):
        with locked(target, cure=WAIT, notice=tell):
            if not _is_whole(path, target):
                shutil.rmtree(target, ignore_errors=True)  # it lost something since
                _extract(path, target, tell)
    inside = list(target.iterdir())
    return (
        inside[0]
        if len(inside) == 1 and inside[0].is_dir() and not re.match(r"iter_|release|mp_rank", inside[0].name)
        else target
    )


def _is_whole(path: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether every file of the archive is in `target` with its size."""
    if not target.exists():
        return False
    with zipfile.ZipFile(path) as archive:
        sizes = {target / each.filename: each.file_size for each in archive.infolist() if not each.is_dir()}
    inside = {file: size for file, size in sizes.items() if os.path.normpath(file).startswith(f"{target}{os.sep}")}
    return all(file.is_file() and file.stat().st_size == size for file, size in inside.items())


def _extract(path: pathlib.Path, target: pathlib.Path, tell: Tell) -> None:
    files.sweep(target, tell)
    aside = files.aside(target)
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(aside)  # names that lead out of the folder are made to stay in it
        aside.rename(target)
    except (zipfile.BadZipFile, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if getattr(error, "errno", None) is not None:  # the disk's fault, not the archive's
            raise
        raise CheckpointError(
            problem(str(path), str(error), "it must be a whole zip archive", "Copy or download it again")
        ) from None
    tell(f"{path} is unpacked in {target}")


def download(url: str, folder: pathlib.Path, tell: Tell) -> pathlib.Path:
    """The file at `url`, in `folder`. What is there of it from an earlier attempt is gone on from, if the server still has the same file.

    The part that is there is download.part; its facts (the server's mark of the file's version, then its size) are in download.json.
    """
    with locked(folder, cure=WAIT, notice=tell):
        return _download(url, folder, tell)


def _download(url: str, folder: pathlib.Path, tell: Tell) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    done = [each for each in folder.iterdir() if each.name not in ("download.part", "download.json")]
    part, facts, failures, name = folder / "download.part", folder / "download.json", 0, ""
    if done:
        if done[0].stat().st_size == _fact(facts, "bytes", done[0].stat().st_size):
            tell(f"{url} is in {done[0]} already")
            return done[0]
        tell(
            f"{done[0]} has {done[0].stat().st_size} bytes, and had {_fact(facts, 'bytes')} when it was fetched: it is fetched again"
        )
        done[0].unlink()
    while not name:
        before = part.stat().st_size if part.exists() else 0
        try:
            name = _continue(url, part, facts, tell)
        except (OSError, urllib.error.URLError, ValueError) as error:  # also timeouts and cut connections
            if getattr(error, "errno", None) in DISK:
                raise
            held = part.stat().st_size if part.exists() else 0
            failures = 0 if held > before else failures + 1
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or failures >= TRIES:
                cure = f"Check the address; the same command goes on after the {size_text(held)} that are in {part}"
                raise CheckpointError(
                    problem(url, str(error), "it must be a file that can be downloaded", cure)
                ) from None
            time.sleep(min(0.1 * 2**failures, 10.0))
    files.write_text(facts, json.dumps({"url": url, "bytes": part.stat().st_size}))
    part.rename(folder / name)
    return folder / name


def _continue(url: str, part: pathlib.Path, facts: pathlib.Path, tell: Tell) -> str:
    """Fetch what is missing of the part; the file's name when it is whole. Raises OSError where the connection is cut."""
    version, start = _fact(facts, "version", ""), part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE) as answer:
        if answer.status != 206:  # the whole file: another version, or a server that knows no ranges
            start = 0
        files.write_text(
            facts,
            json.dumps(
                {"url": url, "version": answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""}
            ),
        )
        length = answer.headers.get("Content-Length")
        whole = start + int(length) if length else None
        tell(f"{url}: {size_text(start)} of {size_text(whole) if whole else 'an unknown size'} are here")
        with open(part, "ab" if start else "wb") as file:
            while piece := answer.read(PIECE):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if whole is not None and part.stat().st_size != whole:
            raise ConnectionError(f"the connection ended after {part.stat().st_size} of {whole} bytes")
        return _name(url, answer.headers.get_filename())


def _fact(facts: pathlib.Path, name: str, otherwise: Any = None) -> Any:
    """What download.json says, if it is there and says that."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(facts.read_text())[name]
    return otherwise


def _name(url: str, given: str | None) -> str:
    """The file's own name, without any folder."""
    last = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name
    return pathlib.PurePosixPath((given or last or "file").replace("\\", "/")).name or "file"
