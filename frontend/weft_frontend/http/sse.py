"""Answers out of a generation stream: one JSON object, or server-sent events.

A chunk is made of a prefix and a suffix that are serialized once for the stream, and the text between them.
"""

from __future__ import annotations

from typing import Any, Protocol

import orjson

from weft.inference.v1.output_pb2 import Usage
from weft_frontend.choice import ChoiceDelta
from weft_frontend.http.call import Call
from weft_frontend.http.sampling import StreamOptions
from weft_frontend.metrics import MeasuredStream

_DONE = b"data: [DONE]\n\n"


class Shape(Protocol):
    """How one API writes choices."""

    object: str
    chunk_object: str
    id_prefix: str
    before_text: bytes  # between a chunk's choice index and its text
    after_text: bytes  # between a chunk's text and the end of its choices

    def choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        """A whole choice."""

    def chunk_choices(self, delta: ChoiceDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that carry a delta with more in it than text."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a choice's first chunk is preceded by."""

    def extra(self, deltas: list[ChoiceDelta]) -> dict[str, Any]:
        """What the answer carries beside its choices."""


def usage_json(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's shape."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


async def completed(stream: MeasuredStream, shape: Shape) -> dict[str, Any]:
    """The whole answer as one JSON value; closes the stream."""
    try:
        deltas = await stream.next() or []
        await stream.next()
    finally:
        stream.close()
    deltas.sort(key=lambda delta: delta.index)
    return {
        "id": shape.id_prefix + stream.id,
        "object": shape.object,
        "created": stream.created,
        "model": stream.model,
        "choices": [shape.choice(delta) for delta in deltas],
        "usage": usage_json(stream.usage),
        **shape.extra(deltas),
    }


class Frames:
    """The events of one stream."""

    def __init__(self, stream: MeasuredStream, shape: Shape, options: StreamOptions) -> None:
        self._stream = stream
        self._shape = shape
        self._include_usage = bool(options.include_usage)
        self._usage_in_each = bool(options.continuous_usage_stats)
        self._head = {
            "id": shape.id_prefix + stream.id,
            "object": shape.chunk_object,
            "created": stream.created,
            "model": stream.model,
        }
        opening = b"data: " + orjson.dumps(self._head)[:-1] + b',"choices":[{"index":'
        self._prefixes = [opening + b"%d" % index + shape.before_text for index in range(stream.num_choices)]
        self._suffix = shape.after_text + (b',"usage":null}\n\n' if self._include_usage else b"}\n\n")
        self._unopened = set(range(stream.num_choices))

    def of(self, deltas: list[ChoiceDelta]) -> bytes:
        """The events of new deltas."""
        return b"".join([self._of_delta(delta) for delta in deltas])

    def end(self) -> bytes:
        """The events after the last delta."""
        if not self._include_usage:
            return _DONE
        return self._event({**self._head, "choices": [], "usage": usage_json(self._stream.usage)}) + _DONE

    def _of_delta(self, delta: ChoiceDelta) -> bytes:
        event = b""
        if delta.index in self._unopened:
            self._unopened.discard(delta.index)
            if (opening := self._shape.opening(delta.index)) is not None:
                event = self._chunk(opening)
        if self._is_text_only(delta):
            text = delta.text
            return event + self._prefixes[delta.index] + orjson.dumps(text) + self._suffix if text else event
        return event + b"".join([self._chunk(choice) for choice in self._shape.chunk_choices(delta)])

    def _is_text_only(self, delta: ChoiceDelta) -> bool:
        has_logprobs = delta.logprobs is not None or delta.prompt_logprobs is not None
        return delta.finish_reason is None and not has_logprobs and not self._usage_in_each

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        chunk: dict[str, Any] = {**self._head, "choices": [choice]}
        if self._usage_in_each:
            chunk["usage"] = usage_json(self._stream.usage)
        elif self._include_usage:
            chunk["usage"] = None
        return self._event(chunk)

    @staticmethod
    def _event(value: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(value) + b"\n\n"


async def answer_events(call: Call, stream: MeasuredStream, frames: Frames) -> None:
    """Answer with the stream's events; closes the stream. Nothing is sent before the first delta, so that a request
    that fails until then is answered with its status."""
    try:
        deltas = await stream.next()
        await call.start_stream(b"text/event-stream; charset=utf-8", b"data: %s\n\n")
        send = call.send
        while deltas is not None:
            await send({"type": "http.response.body", "body": frames.of(deltas), "more_body": True})
            deltas = await stream.next()
        await send({"type": "http.response.body", "body": frames.end()})
    finally:
        stream.close()
