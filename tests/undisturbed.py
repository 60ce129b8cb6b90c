"""A frontend that takes bad input, and a stream that runs through all of it: at the end it must be what it would have
been."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from serving import Served, serving

from weft.inference.v1 import inference_pb2 as pb
from weft.testing import FakeBackend

MAX_MODEL_LEN = 4096
VOCAB_SIZE = 428  # of the byte-level tokenizer in small_tokenizers
LIMIT = 1 << 20  # of a body
SECRET = "do-not-repeat-me"


@asynccontextmanager
async def undisturbed(tokenizer_dir: Path) -> AsyncIterator[Served]:
    """A server for all cases of a protocol."""
    async with (
        FakeBackend(tokenizer_dir, interval=0.01) as fake,
        serving(fake, max_request_bytes=LIMIT) as served,
        undisturbed_stream(served),
    ):
        assert fake.card.vocab_size == VOCAB_SIZE
        yield served


class undisturbed_stream:
    """A stream that runs meanwhile, and is compared at the end with what it should have been."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._text = ""

    async def __aenter__(self) -> None:
        request = pb.GenerateRequest(prompts=[pb.Prompt(text="Hello")])
        request.sampling.max_tokens = 4000
        self._request = request
        self._call = self._served.stub.StreamGenerate(pb.StreamGenerateRequest(request=request))
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for message in self._call:
            self._text += message.choices[0].text

    async def __aexit__(self, *_: object) -> None:
        failed = self._reading.done() and self._reading.exception() is not None
        assert not failed, "the stream broke"
        self._reading.cancel()
        self._served.fake.interval = 0.0
        whole = (await self._served.stub.Generate(self._request)).choices[0].text
        assert self._text
        assert whole.startswith(self._text)
