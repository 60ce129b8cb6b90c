"""The session by which the engine is measured."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from weft.cli.engine_session import EngineSession
from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1.engine_pb2_grpc import EngineServiceServicer, add_EngineServiceServicer_to_server
from weft.errors import WeftError


class Leaving(EngineServiceServicer):
    """A backend that ends a session after the first message, and calls it a success."""

    def GetModel(self, request: object, context: object) -> pb.GetModelResponse:
        return pb.GetModelResponse()

    def Session(self, requests: Iterator[pb.SessionRequest], context: object) -> Iterator[pb.SessionResponse]:
        next(requests)
        return iter(())


def test_a_session_that_the_backend_ends_is_an_error_of_its_own() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    add_EngineServiceServicer_to_server(Leaving(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    session = EngineSession(f"127.0.0.1:{port}")
    try:
        with pytest.raises(WeftError, match="the backend has ended the session"):
            session.open()
    finally:
        session.close()
        server.stop(None)
