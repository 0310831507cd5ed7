"""Where weights are read from: a path, an archive or a URL; an archive or a URL becomes a folder in a cache."""

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
from megalith.common.environment import cache_folder
from megalith.common.errors import CheckpointError, problem
from megalith.common.locks import locked
from megalith.common.units import size as size_text
from megalith.common.urls import is_url
from megalith.config.flags.text import Words

MAX_FAILURES, CHUNK_BYTES, TIMEOUT = 5, 1 << 20, 60.0  # failures without progress; seconds without an answer
WAIT = "Wait for it: what it fetches is then here"
# Errors of the disk, against which trying again does not help.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
Notice = Callable[[str], None]


def local(source: str | os.PathLike, *, sha256: str | None = None, notice: Notice = print) -> pathlib.Path:
    """A path on this machine: that of `source`; a URL is downloaded and a zip archive unpacked, into the cache.

    sha256: the checksum that the file must have. notice: called with each line for the user, such as the checksum of a
    download. Raises CheckpointError where the file cannot be fetched or has another checksum.
    """
    text = os.fspath(source)
    path = (
        download(text, cache_folder() / hashlib.sha256(text.encode()).hexdigest()[:16], notice)
        if is_url(text)
        else pathlib.Path(source)
    )
    if path.is_file() and (is_url(text) or sha256):
        check_sha256(path, sha256, notice)
    return unpack(path, notice) if is_archive(path) else path


def check_sha256(path: pathlib.Path, expected: str | None, notice: Notice) -> None:
    """Show a file's checksum. Raises CheckpointError where it is not the one expected."""
    found = files.sha256(path)
    notice(f"{path}: sha256 {found}")
    if expected and expected.lower() != found:
        cure = f"Delete {path} and try again; if the checksum stays, the publisher's file has changed"
        raise CheckpointError(problem(f"{path}: sha256", found, f"must be {expected}, as --sha256 says", cure))


def is_archive(path: pathlib.Path) -> bool:
    """A zip archive, but not one that torch.save made."""
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return not any(name.endswith("data.pkl") for name in archive.namelist())


def unpack(path: pathlib.Path, notice: Notice) -> pathlib.Path:
    """The folder with an archive's contents; unpacked once, and again where the archive has changed."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:16]
    target = cache_folder() / f"{path.stem}-{key}"
    if not _is_complete(path, target):
        with locked(target, cure=WAIT, notice=notice):
            if not _is_complete(path, target):
                shutil.rmtree(target, ignore_errors=True)  # files of it have been lost since
                _extract(path, target, notice)
    inside = list(target.iterdir())
    return (
        inside[0]
        if len(inside) == 1 and inside[0].is_dir() and not re.match(r"iter_|release|mp_rank", inside[0].name)
        else target
    )


def _is_complete(path: pathlib.Path, target: pathlib.Path) -> bool:
    """Whether every file of the archive is in `target` with its size."""
    if not target.exists():
        return False
    with zipfile.ZipFile(path) as archive:
        sizes = {target / each.filename: each.file_size for each in archive.infolist() if not each.is_dir()}
    inside = {file: size for file, size in sizes.items() if os.path.normpath(file).startswith(f"{target}{os.sep}")}
    return all(file.is_file() and file.stat().st_size == size for file, size in inside.items())


def _extract(path: pathlib.Path, target: pathlib.Path, notice: Notice) -> None:
    files.remove_leftovers(target, notice)
    aside = files.temporary_path(target)
    try:
        with zipfile.ZipFile(path) as archive:
            archive.extractall(aside)  # which keeps names such as ../a inside the folder
        aside.rename(target)
    except (zipfile.BadZipFile, OSError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        if getattr(error, "errno", None) is not None:  # the disk's fault, not the archive's
            raise
        rule, cure = "must be a complete zip archive", "Copy or download it again"
        raise CheckpointError(problem(str(path), Words(str(error)), rule, cure)) from None
    notice(f"{path} is unpacked in {target}")


def download(url: str, folder: pathlib.Path, notice: Notice) -> pathlib.Path:
    """The file at `url`, in `folder`. An earlier attempt is resumed if the server still has the same file.

    What was fetched so far is download.part; download.json holds the server's mark of the file's version, and at the
    end the file's size.
    """
    with locked(folder, cure=WAIT, notice=notice):
        return _download(url, folder, notice)


def _download(url: str, folder: pathlib.Path, notice: Notice) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    done = [each for each in folder.iterdir() if each.name not in ("download.part", "download.json")]
    part, record, failures, name = folder / "download.part", folder / "download.json", 0, ""
    if done:
        size = done[0].stat().st_size
        recorded_size = _recorded(record, "bytes", size)
        if size == recorded_size:
            notice(f"{url} is in {done[0]} already")
            return done[0]
        notice(f"{done[0]} has {size} bytes, and had {recorded_size} when it was fetched: it is fetched again")
        done[0].unlink()
    while not name:
        before = part.stat().st_size if part.exists() else 0
        try:
            name = _resume(url, part, record, notice)
        except (OSError, urllib.error.URLError, ValueError) as error:  # also timeouts and cut connections
            if getattr(error, "errno", None) in DISK_ERRORS:
                raise
            fetched = part.stat().st_size if part.exists() else 0
            failures = 0 if fetched > before else failures + 1
            final = isinstance(error, urllib.error.HTTPError) and error.code < 500
            if final or failures >= MAX_FAILURES:
                cure = f"Check the address; the same command resumes after the {size_text(fetched)} that are in {part}"
                rule = "must be a file that can be downloaded"
                raise CheckpointError(problem(url, Words(str(error)), rule, cure)) from None
            time.sleep(min(0.1 * 2**failures, 10.0))
    files.write_text(record, json.dumps({"url": url, "bytes": part.stat().st_size}))
    part.rename(folder / name)
    return folder / name


def _resume(url: str, part: pathlib.Path, record: pathlib.Path, notice: Notice) -> str:
    """Fetch what is missing of the file, and return its name. Raises OSError where the connection is cut."""
    version, start = _recorded(record, "version", ""), part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={start}-", "If-Range": version} if start and version else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the whole file: another version, or a server without ranges
            start = 0
        version = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        files.write_text(record, json.dumps({"url": url, "version": version}))
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        notice(f"{url}: {size_text(start)} of {size_text(total) if total else 'an unknown size'} are here")
        with open(part, "ab" if start else "wb") as file:
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and part.stat().st_size != total:
            raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")
        return _file_name(url, response.headers.get_filename())


def _recorded(record: pathlib.Path, name: str, default: Any = None) -> Any:
    """A value of download.json, or the default where the file or the value is missing."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads(record.read_text())[name]
    return default


def _file_name(url: str, given: str | None) -> str:
    """The file's name without any folder. given: the name in the server's response."""
    last = pathlib.PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(url).path)).name
    return pathlib.PurePosixPath((given or last or "file").replace("\\", "/")).name or "file"
