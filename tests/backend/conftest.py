"""A backend that serves the fake engine over real sockets, and the ways into it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
from session_client import Session, connected, running_backend, running_session, wait_idle

from weft.engine.v1.engine_pb2_grpc import EngineServiceStub
from weft_backend.server import Backend


@pytest_asyncio.fixture
async def backend() -> AsyncIterator[Backend]:
    """A backend that must be idle and whole at the end of the test."""
    async with running_backend() as running:
        yield running
        await wait_idle(running)


@pytest_asyncio.fixture
async def stub(backend: Backend) -> AsyncIterator[EngineServiceStub]:
    async with connected(backend) as made:
        yield made


@pytest_asyncio.fixture
async def session(backend: Backend) -> AsyncIterator[Session]:
    async with running_session(backend) as made:
        yield made
