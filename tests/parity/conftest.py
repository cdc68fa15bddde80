"""Fixtures over the golden files."""

from __future__ import annotations

import pytest
from golden_files import METHODS, Golden


@pytest.fixture(scope="session", params=METHODS)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


@pytest.fixture(scope="session")
def golden_of() -> type[Golden]:
    return Golden
