"""The files of small tokenizers, and a frontend's core over fake backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHAT_TEMPLATE, byte_fallback_tokenizer, byte_level_tokenizer, tokenizer_files

from weft.testing import FakeBackend
from weft_frontend.config import FrontendConfig
from weft_frontend.generation import Generation


@pytest.fixture(scope="session")
def byte_level_files() -> dict[str, bytes]:
    return tokenizer_files(
        byte_level_tokenizer(), eos_token="<|im_end|>", bos_token="<|endoftext|>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def byte_fallback_files() -> dict[str, bytes]:
    return tokenizer_files(byte_fallback_tokenizer(), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer_dir(byte_level_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, data in byte_level_files.items():
        (folder / name).write_bytes(data)
    return folder


@asynccontextmanager
async def _serve(*fakes: FakeBackend, **settings: Any) -> AsyncIterator[Generation]:
    config = FrontendConfig(backends=tuple(fake.target for fake in fakes), **settings)
    async with Generation(config) as generation:
        async with asyncio.timeout(10):
            await generation.wait_ready()
        yield generation


@pytest.fixture
def serve() -> Callable[..., Any]:
    """``async with serve(*fakes, **settings) as generation``: a frontend core over running fakes."""
    return _serve
