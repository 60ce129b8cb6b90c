"""The built-in model, served as ``weft serve`` serves it; every page must be free after every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from deployment import Backend, Frontend, deployment

Deployed = tuple[list[Backend], list[Frontend]]


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random checkpoint, as a second model."""
    return str(make_checkpoint("qwen2", Path(tmp_path_factory.mktemp("models")) / "small"))


@pytest.fixture(scope="module")
def deployed(small_model: str) -> Iterator[Deployed]:
    """Two backends, weft-tiny and another model, behind two frontends."""
    with deployment([None, small_model], num_frontends=2) as running:
        yield running


@pytest.fixture
def backends(deployed: Deployed) -> Iterator[list[Backend]]:
    """The backends; all of their pages must be free when the test is over."""
    yield deployed[0]
    for backend in deployed[0]:
        backend.assert_idle()


@pytest.fixture
def frontends(deployed: Deployed, backends: list[Backend]) -> list[Frontend]:
    return deployed[1]


@pytest.fixture
def frontend(frontends: list[Frontend]) -> Frontend:
    return frontends[0]
