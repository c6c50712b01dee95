"""A process that runs other projects' trainers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import Hosts


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    started = Hosts()
    yield started
    started.close()
