"""Fixtures that several tests use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def require_shared(path: str) -> Path:
    """A file of ../shared; the test skips without it, unless DECLIP_REQUIRE_SHARED=1 makes that a failure."""
    found = SHARED / path
    if not found.exists():
        if os.environ.get("DECLIP_REQUIRE_SHARED") == "1":
            pytest.fail(f"DECLIP_REQUIRE_SHARED=1, but there is no {path} in ../shared")
        pytest.skip(f"needs {path} from ../shared")
    return found
