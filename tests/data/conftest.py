"""A real object store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from declip.data import remote


@pytest.fixture(scope="session")
def object_store() -> Iterator[Any]:
    """The filesystem of an object store that runs here, with an empty bucket s3://shards."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    store = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setattr(remote, "_filesystems", {})
        files = remote.filesystem("s3://")
        files.mkdir("s3://shards")
        yield files
    store.stop()
