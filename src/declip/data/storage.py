"""Local and remote files, and a bounded cache on disk for copies and derived files, shared by processes."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import quote

from declip.data import remote
from declip.data.patterns import expand
from declip.data.remote import is_remote, scheme
from declip.errors import InputError, first_line
from declip.pairs import Data

__all__ = ["Storage", "cache_folder", "expand", "is_remote", "join"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_folder() -> Path:
    """Where the cache is if nothing else is said: $XDG_CACHE_HOME/declip or ~/.cache/declip."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "declip"


def join(folder: str, name: str) -> str:
    """Path or URL of a file in a folder; a name that is absolute or a URL stands for itself."""
    if is_remote(name) or os.path.isabs(name):
        return name
    if not is_remote(folder):
        return os.path.join(folder, name)
    # In the URL of a page, characters such as # and ? mean something; elsewhere they are names like others.
    return f"{folder.rstrip('/')}/{quote(name) if scheme(folder) in ('http', 'https') else name}"


def parent(path: str) -> str:
    """The folder of a file, as a path or URL."""
    return path.rsplit("/", 1)[0] if is_remote(path) else os.path.dirname(path)


class Storage:
    """Files wherever they are. What is copied or derived is kept in a folder, up to a size, the last used longest.

    Any number of processes may use the folder at once: what several of them want is fetched by one. A file that is open
    or mapped stays readable when it is dropped from the folder. It can be pickled and opens nothing until it is used.
    """

    def __init__(self, folder: Path, limit_bytes: int, retries: int) -> None:
        """folder: of the cache, made when it is needed; retries: of a failed read from a remote place."""
        self.folder, self.limit_bytes, self.retries = folder, limit_bytes, retries
        self._known: dict[str, str] = {}  # URL -> its version when last asked, so that each use is no request

    @staticmethod
    def of(data: Data) -> Storage:
        """As a recipe's data section says."""
        folder = Path(data.index_folder).expanduser() if data.index_folder else cache_folder()
        return Storage(folder, int(data.disk_gb * 1e9), data.retries)

    def version(self, path: str) -> str:
        """What changes when the file changes: size and time of a local file, size and ETag (or date) of an object.

        Asks anew each time. Raises InputError where there is no such file.
        """
        if is_remote(path):
            described = self._describe(path)
            self._known[path] = described.version
            return described.version
        try:
            facts = os.stat(path)
        except (OSError, ValueError):
            raise InputError(f"There is no file {path!r}.") from None
        return f"{facts.st_size}-{facts.st_mtime_ns}"

    def local(self, path: str, version: str | None = None) -> Path:
        """The file itself, or a copy of the object in the cache, fetched if it is not there.

        version: the one that is wanted; not given, an object that changed is fetched anew, at the latest by another
        process. Raises InputError where there is no such file, it has changed, it cannot be read after all tries, or it
        is larger than the cache.
        """
        if not is_remote(path):
            self.check_unchanged(path, version)
            return Path(path)
        wanted = version or self._known.get(path)
        if wanted and self._use(copy := self._place(_name(path, wanted))):
            return copy
        described = self._describe(path)
        self._known[path] = described.version
        self._check_version(path, version, described.version)
        if described.size is not None:
            self._check_fits(path, described.size)

        def fill(temporary: Path) -> None:
            try:
                remote.fetch(path, temporary, described, self.retries)
            except FileNotFoundError:
                raise InputError(f"There is no {path} any more.") from None

        return self._kept(_name(path, described.version), path, described.size or 0, fill)

    def check_unchanged(self, path: str, version: str | None) -> None:
        """Ask for the file's version. Raises InputError where there is no such file, or it is of another version."""
        self._check_version(path, version, self.version(path))

    def read(self, path: str) -> bytes:
        """A whole small file, not kept. Raises OSError where it is missing, InputError where it stays out of reach."""
        return remote.read(path, self.retries) if is_remote(path) else Path(path).read_bytes()

    def open(self, path: str) -> BinaryIO:
        """A file to seek in; of an object only what is read is fetched. Raises InputError where there is none."""
        try:
            if not is_remote(path):
                return open(path, "rb")
            opened: io.BufferedReader = remote.open_ranges(path, self.retries)
            return opened
        except FileNotFoundError:
            raise InputError(f"There is no file {path!r}.") from None
        except OSError as error:
            raise InputError(f"{path} cannot be opened: {first_line(error)}.") from None

    def kept(self, name: str, fill: Callable[[Path], None], said: str = "") -> Path:
        """A derived file. Where it is missing, `fill` writes it into the file it is given, which is then renamed.

        name: says all that the content depends on, the version of what it is derived from as well; said: what messages
        call it.
        """
        return self._kept(_name(name, ""), said or name, 0, fill)

    def files_in(self, folder: str) -> list[str]:
        """The files of a folder, sorted; none where there is no such folder. Raises InputError where it is not read."""
        if is_remote(folder):
            return remote.listed(f"{folder.rstrip('/')}/*", self.retries)
        try:
            with os.scandir(folder) as entries:
                return sorted(entry.path for entry in entries if entry.is_file())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise InputError(f"Folder {folder} cannot be read: {first_line(error)}.") from None

    def index_places(self, path: str) -> list[Path]:
        """Where an index of a file may be, best first: beside it (if it is local), then in the cache folder."""
        name = path if is_remote(path) else os.path.abspath(path)
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
        far = self.folder / f"{_base(path)}.{digest}.index"
        return [far] if is_remote(path) else [Path(path + ".index"), far]

    def _check_version(self, path: str, wanted: str | None, found: str) -> None:
        if wanted not in (None, found):
            raise InputError(f"{path} has changed since it was opened: start again.")

    def _describe(self, url: str) -> remote.Remote:
        try:
            return remote.describe(url, self.retries)
        except FileNotFoundError:
            raise InputError(f"There is no {url}.") from None

    def _place(self, name: str) -> Path:
        return self.folder / "files" / name

    def _use(self, path: Path) -> bool:
        """Whether a file is there; if so, it is now the last used."""
        try:
            now = time.time_ns()  # finer than the clock that the kernel stamps files with
            os.utime(path, ns=(now, now))
        except OSError:
            return False
        return True

    def _kept(self, name: str, said: str, size: int, fill: Callable[[Path], None]) -> Path:
        """A file of the cache, filled by one process while the others wait. size: bytes it will take, 0 if unknown."""
        path = self._place(name)
        if self._use(path):
            return path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _claimed(path) as temporary:
                if temporary is None or self._use(path):
                    return path
                self._make_room(size, path)
                fill(temporary)
                size = temporary.stat().st_size
                self._check_fits(said, size)
                self._make_room(size, path)
                os.replace(temporary, path)
                self._use(path)
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise InputError(
                    f"{said} does not fit on the disk of {self.folder} ({first_line(error)}): free some space, lower "
                    "data.disk_gb or name another folder, data.index_folder=FOLDER."
                ) from None
            raise InputError(
                f"{said} cannot be kept in {self.folder} ({first_line(error)}): name another folder, "
                "data.index_folder=FOLDER."
            ) from None
        return path

    def _check_fits(self, said: str, size: int) -> None:
        if size > self.limit_bytes:
            needed = -(-size // 100_000_000) / 10
            raise InputError(
                f"{said} takes {size:,} bytes, more than the cache may ({self.limit_bytes:,}): "
                f"say data.disk_gb={needed} or more."
            )

    def _make_room(self, size: int, but: Path) -> None:
        """Drop what was used longest ago until `size` more bytes fit, and what killed processes have left.

        Files that are being filled count with what they have so far, so that the folder may for a moment hold more.
        """
        with _locked(self._place(".lock")):
            files, total = [], size
            for entry in os.scandir(but.parent):
                with suppress(OSError):
                    facts = entry.stat()
                    if entry.name.startswith("."):
                        if entry.name == f".{but.name}.part":
                            continue  # `size` is its own
                        total += 0 if _dropped_leftover(Path(entry.path)) else facts.st_size
                    else:
                        files.append((facts.st_mtime_ns, facts.st_size, entry.path))
                        total += facts.st_size
            for _, freed, path in sorted(files):
                if total <= self.limit_bytes:
                    break
                with suppress(OSError):
                    os.unlink(path)
                    total -= freed


def _base(path: str) -> str:
    """The last part of a path or URL, fit for a file's name."""
    base = path.rstrip("/").split("?")[0].rsplit("/", 1)[-1]
    return "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in base)[-80:].lstrip(".")


def _name(path: str, version: str) -> str:
    digest = hashlib.blake2b(os.fsencode(f"{path}\0{version}"), digest_size=16).hexdigest()
    return f"{digest}-{_base(path)}"


# Locks: the kernel takes them from a process that dies, however it dies.


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _claimed(path: Path) -> Iterator[Path | None]:
    """The temporary file of a file, locked and empty; None if another process made the file meanwhile.

    The lock is on the temporary file itself: one without a lock is what a killed process has left.
    """
    temporary = path.with_name(f".{path.name}.part")
    while True:
        with temporary.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file.fileno(), temporary):  # renamed or dropped while this process waited
                if path.exists():
                    yield None
                    return
                continue
            try:
                os.truncate(temporary, 0)
                yield temporary
            finally:
                if _is_at(file.fileno(), temporary):
                    temporary.unlink(missing_ok=True)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _dropped_leftover(temporary: Path) -> bool:
    """Delete a temporary file that nobody fills."""
    if not temporary.name.endswith(".part"):
        return False
    with temporary.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        if _is_at(file.fileno(), temporary):
            temporary.unlink(missing_ok=True)
        return True
