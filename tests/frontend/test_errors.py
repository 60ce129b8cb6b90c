from __future__ import annotations

import grpc
import pytest

from weft_frontend import errors


@pytest.mark.parametrize(
    ("code", "kind", "http_status"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, errors.InvalidRequest, 400),
        (grpc.StatusCode.NOT_FOUND, errors.NotFound, 404),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, errors.Overloaded, 429),
        (grpc.StatusCode.UNIMPLEMENTED, errors.Unsupported, 501),
        (grpc.StatusCode.UNAVAILABLE, errors.Unavailable, 503),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.DeadlineExceeded, 504),
        (grpc.StatusCode.INTERNAL, errors.Internal, 500),
    ],
)
def test_each_status_has_its_error(code: grpc.StatusCode, kind: type[errors.WeftError], http_status: int) -> None:
    error = errors.from_status(code.value[0], "cause", field="sampling.n", reason="WHY", retry_after_ms=7)
    assert type(error) is kind
    assert (error.http_status, error.grpc_status) == (http_status, code)
    assert (error.message, error.field, error.reason, error.retry_after_ms) == ("cause", "sampling.n", "WHY", 7)


def test_a_code_outside_the_tree_is_internal() -> None:
    error = errors.from_status(15, "DATA_LOSS")
    assert type(error) is errors.Internal
    assert error.reason == "INTERNAL"
