"""A Node client made from the protos alone."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from serving import serving
from small_tokenizers import CHAT_TEMPLATE, byte_level_tokenizer, tokenizer_files

from weft.testing import FakeBackend

FOLDER = Path(__file__).parent / "node"
PROTOS = Path(__file__).parents[2] / "protos"

pytestmark = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(*command, cwd=FOLDER, stdout=-1)
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


@pytest.fixture(scope="module")
def packages() -> None:
    """The two packages of package.json."""
    if not (FOLDER / "node_modules").is_dir():
        asyncio.run(run("npm", "ci", "--no-audit", "--no-fund"))


@pytest.fixture
async def target() -> AsyncIterator[str]:
    """The gRPC address of a frontend."""
    files = tokenizer_files(byte_level_tokenizer(), eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)
    async with FakeBackend(files) as fake, serving(fake) as served:
        yield f"127.0.0.1:{served.grpc_port}"


@pytest.mark.usefixtures("packages")
async def test_node_lists_generates_and_streams(target: str) -> None:
    seen = json.loads(await run("node", "client.js", target, str(PROTOS)))
    assert len(seen["models"]) == 1
    assert seen["generated"]["choices"][0]["text"]
    assert seen["generated"]["usage"]["completionTokens"] <= 7
    streamed = seen["streamed"]
    choices = [choice for message in streamed for choice in message["choices"]]
    assert "".join(choice["text"] for choice in choices)
    assert choices[0]["role"] == "assistant"
    assert choices[-1]["finishReason"] in ("FINISH_REASON_LENGTH", "FINISH_REASON_STOP")
    assert streamed[-1]["usage"]["completionTokens"] <= 20
    assert seen["refused"]["code"] == "INVALID_ARGUMENT"
    assert "top_p" in seen["refused"]["message"]
