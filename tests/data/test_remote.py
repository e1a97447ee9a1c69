"""Remote files: a real object store and an HTTP server that fails on purpose, both started here."""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from declip.data import remote
from declip.data.storage import Storage, expand
from declip.errors import InputError

pytest.importorskip("aiohttp")

BODY = bytes(range(256)) * 400


class Server(ThreadingHTTPServer):
    """Serves BODY under every name. `plan`: of a name, what its next GETs do; the last goes on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan: dict[str, list[str]] = {}
        self.gets: Counter[str] = Counter()
        self.headers: dict[str, str] = {"ETag": '"1"'}
        self.body = BODY
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections are cut on purpose."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        plan = self.server.plan.get(self.path.lstrip("/"), [""])
        self._answer(int(plan[0]) if plan[0] in ("403", "404") else 200, self.server.body, head=True)

    def do_GET(self) -> None:
        name = self.path.lstrip("/").split("?")[0]
        self.server.gets[name] += 1
        plan = self.server.plan.get(name, ["fine"])
        todo = plan.pop(0) if len(plan) > 1 else plan[0]
        body = self.server.body
        if todo.isdigit():
            self._answer(int(todo), b"no")
        elif todo == "cut":
            self._answer(200, body, sent=len(body) // 2)
        elif todo == "short":  # whole to the eye of HTTP
            self._answer(200, body[:100])
        elif todo == "wrong":
            self._answer(200, b"y" * len(body))
        elif todo == "ranges" and "Range" in self.headers:
            start, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            self._answer(206, body[int(start) : int(end) + 1])
        else:
            self._answer(200, body)

    def _answer(self, status: int, body: bytes, sent: int | None = None, head: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if not head:
            self.wfile.write(body[:sent])
        if sent is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running
        running.shutdown()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses that were asked for; none is made."""
    asked: list[float] = []
    monkeypatch.setattr(remote, "sleep", asked.append)
    return asked


@pytest.fixture
def storage(tmp_path: Path, waits: list[float]) -> Storage:
    return Storage(tmp_path / "cache", 1_000_000, retries=3)


# What goes wrong on the way


@pytest.mark.parametrize("failure", ["500", "503", "429", "cut", "short"])
def test_failures_that_pass(server: Server, storage: Storage, waits: list[float], failure: str) -> None:
    server.plan["a.tar"] = [failure, failure, "fine"]
    copy = storage.local(server.url("a.tar"))
    assert copy.read_bytes() == BODY
    assert server.gets["a.tar"] == 3
    assert len(waits) == 2
    assert waits[0] < waits[1] <= 1.0
    assert storage.local(server.url("a.tar")) == copy
    assert server.gets["a.tar"] == 3


def test_a_failure_that_stays(server: Server, storage: Storage, waits: list[float]) -> None:
    server.plan["a.tar"] = ["503"]
    with pytest.raises(InputError, match=r"^http://.*/a.tar could not be read, tried 4 times: .*503.*data.retries\.$"):
        storage.local(server.url("a.tar"))
    assert server.gets["a.tar"] == 4
    assert len(waits) == 3
    assert [path.name for path in (storage.folder / "files").iterdir()] == [".lock"]


def test_short_files_are_counted(server: Server, storage: Storage) -> None:
    server.plan["a.tar"] = ["short"]
    with pytest.raises(InputError, match=r"tried 4 times: 100 of 102,400 bytes came"):
        storage.local(server.url("a.tar"))


def test_a_checksum_is_checked(server: Server, storage: Storage) -> None:
    server.headers["Content-MD5"] = b64encode(hashlib.md5(BODY).digest()).decode()
    server.plan["a.tar"] = ["wrong", "fine"]
    assert storage.local(server.url("a.tar")).read_bytes() == BODY
    server.plan["b.tar"] = ["wrong"]
    with pytest.raises(InputError, match="another md5 checksum"):
        storage.local(server.url("b.tar"))


@pytest.mark.parametrize(("status", "said"), [("404", "There is no .*a.tar"), ("403", "may not be read .*credentials")])
def test_what_trying_again_cannot_mend(
    server: Server, storage: Storage, waits: list[float], status: str, said: str
) -> None:
    server.plan["a.tar"] = [status]
    for use in (storage.version, storage.local, storage.open):
        with pytest.raises(InputError, match=said):
            use(server.url("a.tar"))
    assert waits == []


def test_read_says_missing_as_of_a_local_file(server: Server, storage: Storage) -> None:
    server.plan["a.txt"] = ["404"]
    with pytest.raises(FileNotFoundError):
        storage.read(server.url("a.txt"))
    assert storage.read(server.url("b.txt")) == BODY


def test_a_server_that_is_silent(server: Server, storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE", 0.1)
    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setattr(Handler, "do_GET", lambda handler: threading.Event().wait(1))
    with pytest.raises(InputError, match=r"tried 4 times: .*imeout"):
        storage.local(server.url("a.tar"))


def test_nobody_answers(server: Server, storage: Storage) -> None:
    server.shutdown()
    server.server_close()
    with pytest.raises(InputError, match=r"tried 4 times: .*onnect"):
        storage.version(server.url("a.tar"))


def test_a_changed_object_is_fetched_anew(server: Server, storage: Storage) -> None:
    url = server.url("a.tar")
    before = storage.version(url)
    assert storage.local(url).read_bytes() == BODY
    server.body, server.headers["ETag"] = BODY[::-1], '"2"'
    assert storage.version(url) != before
    assert storage.local(url).read_bytes() == BODY[::-1]


@pytest.mark.parametrize("plan", [["ranges"], ["fine"], ["ranges", "500", "cut", "ranges"]])
def test_reading_in_parts(server: Server, storage: Storage, plan: list[str]) -> None:
    server.plan["a.parquet"] = plan
    with storage.open(server.url("a.parquet")) as file:
        assert file.seek(-6, 2) == len(BODY) - 6
        assert file.read() == BODY[-6:]
        file.seek(300)
        assert file.read(5) == BODY[300:305]
        assert file.seek(0) == 0
        assert file.read() == BODY


def test_packages_that_are_missing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(*args: Any, **options: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "_filesystems", {})
    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(InputError, match=r"s3://b/k needs .*pip install 'declip\[remote\]'"):
        storage.version("s3://b/k")


def test_a_scheme_nobody_knows(storage: Storage) -> None:
    with pytest.raises(InputError, match=r"nowhere://a cannot be opened: Protocol not known"):
        storage.local("nowhere://a")


def test_http_has_no_folders(server: Server) -> None:
    assert expand(server.url("{0..1}.tar?key=1")) == [server.url(f"{n}.tar?key=1") for n in (0, 1)]
    with pytest.raises(InputError, match="HTTP has no folders"):
        expand(server.url("*.tar"))


# The cache


def test_larger_than_the_cache_is_not_even_fetched(server: Server, storage: Storage) -> None:
    storage.limit_bytes = 1000
    with pytest.raises(InputError, match=r"a.tar takes 102,400 bytes, .*data.disk_gb="):
        storage.local(server.url("a.tar"))
    assert server.gets["a.tar"] == 0


def test_the_cache_is_bounded(server: Server, storage: Storage) -> None:
    storage.limit_bytes = 2 * len(BODY)
    for name in ("a", "b", "a", "c", "a", "b"):
        assert storage.local(server.url(name)).read_bytes() == BODY
        held = sum(path.stat().st_size for path in (storage.folder / "files").iterdir())
        assert held <= storage.limit_bytes
    assert server.gets == {"a": 1, "b": 2, "c": 1}


def run_all(target: Any, *args: Any, count: int) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target, args=args) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0] * count


def copies_are_whole(storage: Storage, urls: list[str], content: bytes) -> None:
    assert all(storage.local(url).read_bytes() == content for url in urls)


def test_processes_fetch_a_shard_once(server: Server, storage: Storage) -> None:
    run_all(copies_are_whole, storage, [server.url(name) for name in "abc"], BODY, count=4)
    assert server.gets == {"a": 1, "b": 1, "c": 1}


def test_a_fork_after_use(server: Server, storage: Storage) -> None:
    assert storage.local(server.url("a")).read_bytes() == BODY  # fsspec's thread runs now, in this process alone
    run_all(copies_are_whole, storage, [server.url("b")], BODY, count=1)
    assert storage.local(server.url("c")).read_bytes() == BODY


# A real object store


@pytest.fixture
def bucket(object_store: Any) -> str:
    """The URL of a folder in an object store with three shards."""
    for name in ("00", "01", "other"):
        object_store.pipe_file(f"s3://shards/set/{name}.tar", name.encode())
    return "s3://shards/set"


def test_store_copies(bucket: str, storage: Storage) -> None:
    assert storage.local(f"{bucket}/00.tar").read_bytes() == b"00"
    assert storage.read(f"{bucket}/other.tar") == b"other"
    with storage.open(f"{bucket}/other.tar") as file:
        file.seek(2)
        assert file.read() == b"her"


def test_store_patterns(bucket: str) -> None:
    assert expand(f"{bucket}/0*.tar") == [f"{bucket}/00.tar", f"{bucket}/01.tar"]
    assert expand(f"{bucket}/0?.tar") == expand(f"{bucket}/{{00..01}}.tar") == expand(f"{bucket}/0[01].tar")
    assert expand(f"{bucket}/{{o,0}}*.tar") == [f"{bucket}/{name}.tar" for name in ("other", "00", "01")]
    with pytest.raises(InputError, match=r"No file matches 's3://shards/set/9\*'"):
        expand(f"{bucket}/9*")


def test_store_missing(bucket: str, storage: Storage, waits: list[float]) -> None:
    for url in (f"{bucket}/none.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(InputError, match=f"There is no {url}"):
            storage.local(url)
    assert waits == []


def test_store_changes(bucket: str, storage: Storage) -> None:
    url = f"{bucket}/changing.bin"
    for content in (b"one", b"two"):
        remote.filesystem(url).pipe_file(url, content)
        storage.version(url)
        assert storage.local(url).read_bytes() == content


def test_store_after_a_fork(bucket: str, storage: Storage) -> None:
    storage.version(f"{bucket}/01.tar")
    run_all(copies_are_whole, storage, [f"{bucket}/01.tar"], b"01", count=2)


def test_memory(storage: Storage) -> None:
    remote.filesystem("memory://").pipe_file("memory://folder/a.bin", b"abc")
    (url,) = expand("memory://folder/*.bin")
    assert storage.local(url).read_bytes() == b"abc"
