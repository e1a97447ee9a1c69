"""Files in object stores and behind HTTP, through fsspec: opened anew in each process, tried again where that helps."""

from __future__ import annotations

import base64
import binascii
import errno
import hashlib
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from declip.errors import InputError, first_line

Result = TypeVar("Result")

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_HTTP = ("http", "https")
_LONGEST_WAIT = 30.0  # seconds between two tries
_SILENCE = 60.0  # seconds without a byte, after which a connection counts as lost
_BUFFER = 1 << 20
# What tells one state of an object from the next, best first; stores name it differently.
_STATES = ("ETag", "etag", "md5Hash", "Content-MD5", "blob_id", "generation", "mtime", "created", "Last-Modified")
_BUSY = (408, 425, 429)  # statuses below 500 that pass
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)  # what a write to the cache fails with
_NETWORK_PACKAGES = ("aiohttp", "httpx", "httpcore", "requests", "urllib3", "http")
_NETWORK_ERRORS = ("HTTPClientError", "ConnectionError", "ResponseStreamingError", "IncompleteReadError")  # botocore's

sleep: Callable[[float], None] = time.sleep  # a name of its own, so that tests need not wait
_filesystems: dict[tuple[int, str], Any] = {}


class Remote(NamedTuple):
    """What a store says about an object. size: bytes, None where it is not said."""

    size: int | None
    version: str
    check: tuple[str, str] | None  # hashlib's name of a checksum and its value in hexadecimal


def scheme(path: str) -> str | None:
    """The scheme of a URL in lower case; None for a local path."""
    match = _SCHEME.match(path)
    return match[1].lower() if match else None


def is_remote(path: str) -> bool:
    """Whether a path is a URL: it has a scheme, ``xxx://``."""
    return scheme(path) is not None


def filesystem(url: str) -> Any:
    """fsspec's filesystem of a URL, this process's own. Raises InputError where there is none or a package is missing.

    fsspec's thread does not survive a fork, and a filesystem made before it waits for that thread forever. Those of
    the parent are kept, not used: closing them would wait too.
    """
    import fsspec

    protocol = scheme(url) or "file"
    key = (os.getpid(), protocol)
    if key not in _filesystems:
        options: dict[str, Any] = {}
        if protocol in _HTTP:
            options["client_kwargs"] = {"timeout": _http_timeout(url)}
        try:
            _filesystems[key] = fsspec.filesystem(
                protocol, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except ImportError:
            raise _not_installed(url) from None
        except ValueError as error:
            raise InputError(f"{url} cannot be opened: {first_line(error)}.") from None
    return _filesystems[key]


def _http_timeout(url: str) -> Any:
    try:
        import aiohttp
    except ImportError:
        raise _not_installed(url) from None
    # aiohttp's own limit is on the whole transfer, and five minutes are not enough for a large shard.
    return aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)


def _not_installed(url: str) -> InputError:
    return InputError(f"{url} needs packages that are not installed: pip install 'declip[remote]'.")


def attempt(url: str, retries: int, action: Callable[[], Result]) -> Result:
    """Do what may fail and try again, `retries` times, with growing pauses; but not what will fail again.

    Raises FileNotFoundError where there is no such object, InputError on anything else.
    """
    for tried in range(1, retries + 2):
        try:
            return action()
        except InputError:
            raise
        except Exception as error:
            if not _is_transient(error):
                raise _lasting(url, error) from None
            said = first_line(_origin(error))
        if tried <= retries:
            pause = min(0.5 * 2 ** (tried - 1), _LONGEST_WAIT)
            sleep(pause * random.uniform(0.5, 1.0))  # workers that failed together do not come back together
    times = "once" if retries == 0 else f"{retries + 1} times"
    raise InputError(f"{url} could not be read, tried {times}: {said}; try again later or raise data.retries.")


def describe(url: str, retries: int) -> Remote:
    """Size and version of an object. Raises FileNotFoundError or InputError."""

    def ask() -> Remote:
        files = filesystem(url)
        files.invalidate_cache()
        said = files.info(url)
        if said.get("type") == "directory":
            raise FileNotFoundError(url)
        size = None if said.get("size") is None else int(said["size"])
        state = next((said[name] for name in _STATES if said.get(name) is not None), "unnamed")
        state = str(state).strip('"')
        return Remote(size, f"{'unknown' if size is None else size}-{state}", _checksum(said))

    return attempt(url, retries, ask)


def fetch(url: str, path: Path, remote: Remote, retries: int) -> None:
    """Copy an object into a file. Raises FileNotFoundError or InputError, also where what came is not all of it."""

    def copy() -> None:
        filesystem(url).get_file(url, str(path))
        came = path.stat().st_size
        if remote.size is not None and came != remote.size:
            raise ConnectionError(f"{came:,} of {remote.size:,} bytes came")
        if remote.check:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, remote.check[0]).hexdigest()
            if found != remote.check[1]:
                raise ConnectionError(f"what came has another {remote.check[0]} checksum than the store says")

    attempt(url, retries, copy)


def read(url: str, retries: int) -> bytes:
    """A whole object. Raises FileNotFoundError or InputError."""
    return attempt(url, retries, lambda: bytes(filesystem(url).cat_file(url)))


def open_ranges(url: str, retries: int) -> io.BufferedReader:
    """An object as a file to seek in, which asks only for what is read. Raises FileNotFoundError or InputError."""
    remote = describe(url, retries)
    if remote.size is None:
        raise InputError(f"{url} cannot be read in parts: its server does not say how large it is; copy it first.")
    return io.BufferedReader(_Ranges(url, remote.size, retries), _BUFFER)


def listed(pattern: str, retries: int) -> list[str]:
    """The URLs that a pattern with ``*``, ``?`` or ``[..]`` matches, sorted.

    Raises InputError behind HTTP, where nothing can be listed.
    """
    if scheme(pattern) in _HTTP:
        raise InputError(f"{pattern} cannot be listed, as HTTP has no folders: name the files, as {{000..099}}.")

    def ask() -> list[str]:
        files = filesystem(pattern)
        files.invalidate_cache()
        return sorted(str(files.unstrip_protocol(name)) for name in files.glob(pattern))

    try:
        return attempt(pattern, retries, ask)
    except FileNotFoundError:
        return []


class _Ranges(io.RawIOBase):
    """Reads of ranges, each tried again by itself."""

    def __init__(self, url: str, size: int, retries: int) -> None:
        super().__init__()
        self.url, self.size, self.retries, self.at = url, size, retries, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        start, end = self.at, min(self.at + len(buffer), self.size)
        if start >= end:
            return 0
        data = attempt(self.url, self.retries, lambda: self._range(start, end))
        buffer[: len(data)] = data
        self.at = end
        return len(data)

    def _range(self, start: int, end: int) -> bytes:
        data = bytes(filesystem(self.url).cat_file(self.url, start=start, end=end))
        if len(data) == self.size:  # a server that knows no ranges sends everything
            data = data[start:end]
        if len(data) != end - start:
            raise ConnectionError(f"{len(data):,} of {end - start:,} bytes came")
        return data


def _checksum(said: dict[str, Any]) -> tuple[str, str] | None:
    """The checksum a store gives. S3's ETag is none: with some encryptions it is not that of the content."""
    lfs = said.get("lfs")
    if lfs and (value := lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)):
        return "sha256", str(value)
    md5 = said.get("md5Hash") or said.get("Content-MD5")
    try:
        return ("md5", base64.b64decode(md5, validate=True).hex()) if md5 else None
    except (binascii.Error, ValueError):
        return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came from: fsspec gives a server's failure as a missing file."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _origin(error: BaseException) -> BaseException:
    return list(_chain(error))[-1]


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, whichever package raised it."""
    for one in _chain(error):
        response = getattr(one, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        gcs = getattr(one, "code", None) if type(one).__module__.startswith("gcsfs") else None
        for status in (told, getattr(response, "status_code", None), getattr(one, "status", None), gcs):
            if isinstance(status, int) and 400 <= status < 600:
                return status
    return None


def _is_transient(error: BaseException) -> bool:
    """Whether the same may go well a moment later."""
    status = _status(error)
    if status is not None:
        return status in _BUSY or status >= 500
    origin = _origin(error)
    if isinstance(origin, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    if isinstance(origin, OSError):
        return origin.errno not in _DISK
    if isinstance(origin, ValueError):
        return False  # a URL that makes no sense
    network = type(origin).__module__.split(".")[0] in _NETWORK_PACKAGES
    return network or any(kind.__name__ in _NETWORK_ERRORS for kind in type(origin).__mro__)


def _lasting(url: str, error: BaseException) -> Exception:
    status, origin = _status(error), _origin(error)
    if status in (401, 403) or (status is None and isinstance(error, PermissionError)):
        return InputError(f"{url} may not be read ({first_line(origin)}): check the credentials in the environment.")
    if status in (404, 410) or (status is None and isinstance(error, FileNotFoundError)):
        return FileNotFoundError(errno.ENOENT, "There is no such object", url)
    if isinstance(origin, OSError) and origin.errno in _DISK:
        return InputError(
            f"{url} cannot be copied to the cache ({first_line(origin)}): free some space, lower data.disk_gb or name "
            "another folder, data.index_folder=FOLDER."
        )
    return InputError(f"{url} cannot be read: {first_line(origin)}.")
