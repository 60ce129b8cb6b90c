"""A backend without a model: speaks the engine contract over a real socket, and gives a token per interval.

For tests of frontends, and for measuring one alone::

    async with FakeBackend(tokenizer_dir) as fake:
        ...  # fake.target

    python -m weft.testing --tokenizer DIR --port 50052 --interval 0.01
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2_grpc

from weft.engine.v1 import engine_pb2 as pb
from weft.engine.v1 import engine_pb2_grpc, model_pb2
from weft.limits import CONTRACT_VERSION, InvalidField, Unsupported, check_token_request, default_limits
from weft.server import Health

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")
MAX_CHUNK_BYTES = 1 << 20
ACK_WINDOW = 1024

# The ids that a sequence generates, by request and choice; an endless or a long enough run.
Script = Callable[[pb.TokenRequest, int], Sequence[int]]


@dataclass(slots=True)
class _Sequence:
    """One choice of a running request."""

    choice: int
    token_ids: Sequence[int]  # to generate; begins again when they run out
    num_done: int = 0
    is_finished: bool = False


@dataclass(slots=True)
class _Running:
    """A running request."""

    request: pb.TokenRequest
    sequences: list[_Sequence]
    submitted_at: float
    num_steps: int = 0


class FakeBackend:
    """Serves one made-up model; an async context manager.

    Args:
        tokenizer: folder of the tokenizer's files, or the files by name.
        script: what to generate; default: words of the vocabulary, in turn. It ends at an end-of-sequence id, a stop
            id or the length that the request asks for, as a real backend's would.
        interval: seconds between steps.
        address: where to listen; port 0 takes a free one.
        card: replaces fields of the model card.
    """

    def __init__(
        self,
        tokenizer: Path | Mapping[str, bytes],
        script: Script | None = None,
        *,
        interval: float = 0.001,
        address: str = "127.0.0.1:0",
        card: model_pb2.ModelCard | None = None,
    ) -> None:
        self.files = _read_files(tokenizer) if isinstance(tokenizer, Path) else dict(tokenizer)
        self.card = _make_card(self.files)
        self.card.MergeFrom(card or model_pb2.ModelCard())
        self.interval = interval
        self.target = address
        self.requests: list[pb.TokenRequest] = []  # every request that was submitted, bad ones too
        self.num_steps = 0
        self.num_cancelled = 0
        self.num_acked_steps = 0
        self.stalled = False  # while set, nothing is sent at all: neither tokens nor signs of life
        self.failure: pb.RequestFailure | None = None  # while set, each request fails with it at its second step
        self.load = model_pb2.LoadReport(free_pages=self.card.num_pages, total_pages=self.card.num_pages)
        self._script = script or _words(self.files)
        self._sessions: list[_Session] = []
        self._server: grpc.aio.Server | None = None

    @property
    def num_running(self) -> int:
        """Requests that run now, over all sessions."""
        return sum(len(session.running) for session in self._sessions)

    async def __aenter__(self) -> FakeBackend:
        self._server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServiceServicer_to_server(_Service(self), self._server)  # type: ignore[no-untyped-call]
        health = Health("weft.engine.v1.EngineService")
        health.set_ready(True)
        health_pb2_grpc.add_HealthServicer_to_server(health, self._server)
        port = self._server.add_insecure_port(self.target)
        if not self.target.startswith("unix:"):
            self.target = f"{self.target.rpartition(':')[0]}:{port}"
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.die()

    async def die(self) -> None:
        """Close the socket and all sessions at once."""
        if self._server is not None:
            await self._server.stop(None)

    def send_load(self, load: model_pb2.LoadReport) -> None:
        """Report a load to all frontends."""
        self.load = load
        for session in self._sessions:
            session.send(pb.SessionResponse(load=load))


class _Session:
    """The stream of one frontend."""

    def __init__(self, backend: FakeBackend) -> None:
        self.running: dict[int, _Running] = {}
        self._backend = backend
        self._outbox: asyncio.Queue[pb.SessionResponse] = asyncio.Queue()

    def send(self, response: pb.SessionResponse) -> None:
        self._outbox.put_nowait(response)

    async def receive(self, requests: AsyncIterator[pb.SessionRequest]) -> None:
        async for frame in requests:
            match frame.WhichOneof("frame"):
                case "hello":
                    self.send(
                        pb.SessionResponse(
                            welcome=pb.Welcome(
                                epoch=time.time_ns(),
                                contract_version=CONTRACT_VERSION,
                                model=self._backend.card,
                                ack_window=ACK_WINDOW,
                            )
                        )
                    )
                    self.send(pb.SessionResponse(load=self._backend.load))
                case "submit":
                    self._submit(frame.submit.slot, frame.submit.request)
                case "cancel":
                    self._backend.num_cancelled += self.running.pop(frame.cancel.slot, None) is not None
                case "ack":
                    self._backend.num_acked_steps = frame.ack.num_steps

    async def outgoing(self) -> AsyncIterator[pb.SessionResponse]:
        """Frames to send: those in the outbox, a step per interval while requests run, heartbeats in silence."""
        next_step = last_sent = time.monotonic()
        while True:
            now = time.monotonic()
            if not self._backend.stalled:
                if self.running and now >= next_step:
                    self._run_step()
                    next_step = max(next_step + self._backend.interval, now)
                elif now - last_sent > 5:
                    self.send(pb.SessionResponse(heartbeat=pb.Heartbeat()))
                while not self._outbox.empty():
                    last_sent = now
                    yield self._outbox.get_nowait()
            await asyncio.sleep(max(0.0, next_step - time.monotonic()) if self.running else 0.002)

    def _submit(self, slot: int, request: pb.TokenRequest) -> None:
        self._backend.requests.append(request)
        try:
            check_token_request(request, self._backend.card)
        except InvalidField as error:
            code = grpc.StatusCode.UNIMPLEMENTED if isinstance(error, Unsupported) else grpc.StatusCode.INVALID_ARGUMENT
            self._fail(slot, pb.RequestFailure(code=code.value[0], message=str(error), field=error.field))
            return
        script = self._backend._script
        sequences = [_Sequence(choice, script(request, choice)) for choice in range(max(1, request.sampling.n))]
        self.running[slot] = _Running(request, sequences, time.monotonic())

    def _fail(self, slot: int, failure: pb.RequestFailure) -> None:
        self.running.pop(slot, None)
        named = pb.RequestFailure(slot=slot, reason="FAKE")
        named.MergeFrom(failure)
        named.slot = slot
        self.send(pb.SessionResponse(failure=named))

    def _run_step(self) -> None:
        frame = pb.StepFrame(step=self._backend.num_steps)
        writer = _FrameWriter(frame, self._backend.card)
        for slot, running in list(self.running.items()):
            if self._backend.failure is not None and running.num_steps == 1:
                self._fail(slot, self._backend.failure)
                continue
            writer.add(slot, running)
            running.num_steps += 1
            if all(sequence.is_finished for sequence in running.sequences):
                del self.running[slot]
        writer.finish()
        self._backend.num_steps += 1
        self.send(pb.SessionResponse(step=frame))


class _FrameWriter:
    """Packs one step."""

    def __init__(self, frame: pb.StepFrame, card: model_pb2.ModelCard) -> None:
        self._frame = frame
        self._card = card
        self._slots: list[int] = []
        self._choices: list[int] = []
        self._indexes: list[int] = []
        self._token_ids: list[int] = []
        self._logprob_rows = 0  # bit i: row i has log-probabilities

    def add(self, slot: int, running: _Running) -> None:
        """The next token of each of a request's sequences."""
        sampling = running.request.sampling
        if not running.num_steps and sampling.HasField("prompt_logprobs"):
            chunk = self._frame.prompt_logprobs.add(slot=slot, start=1)
            for token_id in list(running.request.prompt_token_ids)[1:]:
                self._add_logprobs(chunk.logprobs, token_id, sampling.prompt_logprobs, choice=0)
        for sequence in running.sequences:
            if not sequence.is_finished:
                self._add_token(slot, running, sequence)

    def finish(self) -> None:
        """Put the columns in; those that hold only their default stay empty."""
        self._frame.slots.extend(self._slots)
        self._frame.token_indexes.extend(self._indexes)
        self._frame.token_ids.extend(self._token_ids)
        if any(self._choices):
            self._frame.choices.extend(self._choices)
        if self._logprob_rows:
            self._frame.logprob_rows = self._logprob_rows.to_bytes((len(self._slots) + 7) // 8, "little")

    def _add_token(self, slot: int, running: _Running, sequence: _Sequence) -> None:
        sampling = running.request.sampling
        room = self._card.max_model_len - len(running.request.prompt_token_ids)
        most = sampling.max_tokens if sampling.HasField("max_tokens") else room
        if not most:
            self._end(slot, running, sequence, pb.FINISH_REASON_LENGTH, None)
            return
        index = sequence.num_done
        token_id = sequence.token_ids[index % len(sequence.token_ids)]
        self._slots.append(slot)
        self._choices.append(sequence.choice)
        self._indexes.append(index)
        self._token_ids.append(token_id)
        if sampling.HasField("logprobs"):
            self._logprob_rows |= 1 << (len(self._slots) - 1)
            self._add_logprobs(self._frame.logprobs, token_id, sampling.logprobs, sequence.choice)
        sequence.num_done += 1
        is_eos = token_id in self._card.eos_token_ids and not sampling.ignore_eos
        if (is_eos or token_id in sampling.stop_token_ids) and sequence.num_done > sampling.min_tokens:
            self._end(slot, running, sequence, pb.FINISH_REASON_STOP, token_id)
        elif sequence.num_done >= most:
            self._end(slot, running, sequence, pb.FINISH_REASON_LENGTH, None)

    def _add_logprobs(self, columns: pb.LogprobColumns, token_id: int, num_top: int, choice: int) -> None:
        """Made up: the token is the likeliest, and later choices are likelier."""
        best = -1.0 / (choice + 1)
        columns.token_logprobs.append(best)
        columns.token_ranks.append(1)
        columns.num_top.append(num_top)
        columns.top_token_ids.extend((token_id + i) % self._card.vocab_size for i in range(num_top))
        columns.top_logprobs.extend(best - i for i in range(num_top))

    def _end(
        self, slot: int, running: _Running, sequence: _Sequence, reason: pb.FinishReason, stop_token_id: int | None
    ) -> None:
        sequence.is_finished = True
        finish = self._frame.finishes.add(slot=slot, choice=sequence.choice, reason=reason)
        if stop_token_id is not None:
            finish.stop_token_id = stop_token_id
        if all(other.is_finished for other in running.sequences):
            finish.summary.num_prompt_tokens = len(running.request.prompt_token_ids)
            finish.summary.num_generated_tokens = sum(other.num_done for other in running.sequences)
            finish.summary.decode_seconds = time.monotonic() - running.submitted_at


class _Service(engine_pb2_grpc.EngineServiceServicer):
    """The part of the contract that a frontend uses; the rest is UNIMPLEMENTED."""

    def __init__(self, backend: FakeBackend) -> None:
        self._backend = backend

    async def Session(
        self, requests: AsyncIterator[pb.SessionRequest], context: Any
    ) -> AsyncIterator[pb.SessionResponse]:
        session = _Session(self._backend)
        self._backend._sessions.append(session)
        receiving = asyncio.create_task(session.receive(requests))
        try:
            async for response in session.outgoing():
                yield response
        finally:
            receiving.cancel()
            self._backend._sessions.remove(session)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return pb.GetModelResponse(model=self._backend.card)

    async def GetTokenizer(
        self, request: pb.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[pb.GetTokenizerResponse]:
        for name, data in self._backend.files.items():
            sha256 = hashlib.sha256(data).hexdigest()
            for start in range(0, max(1, len(data)), MAX_CHUNK_BYTES):
                chunk = data[start : start + MAX_CHUNK_BYTES]
                yield pb.GetTokenizerResponse(name=name, total_bytes=len(data), sha256=sha256, data=chunk)

    async def ResetPrefixCache(self, request: pb.ResetPrefixCacheRequest, context: Any) -> pb.ResetPrefixCacheResponse:
        return pb.ResetPrefixCacheResponse(num_pages=3)


def _read_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}


def _make_card(files: Mapping[str, bytes]) -> model_pb2.ModelCard:
    tokenizer = json.loads(files["tokenizer.json"])
    added = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + files[name])
    return model_pb2.ModelCard(
        name="fake",
        architecture="FakeForCausalLM",
        vocab_size=len(tokenizer["model"]["vocab"].keys() | added.keys()),
        max_model_len=4096,
        eos_token_ids=[added[config["eos_token"]]] if config.get("eos_token") in added else [],
        dtype="float32",
        block_size=16,
        num_pages=1024,
        max_num_seqs=256,
        model_hash="fake",
        tokenizer_hash=digest.hexdigest(),
        limits=default_limits(),
        created=int(time.time()),
    )


def _words(files: Mapping[str, bytes]) -> Script:
    """Tokens of letters only, in turn, from a place that the request and choice decide."""
    vocab = json.loads(files["tokenizer.json"])["model"]["vocab"]
    words = sorted(token_id for token, token_id in vocab.items() if token.strip("Ġ▁").isascii() and token[1:].isalpha())

    def script(request: pb.TokenRequest, choice: int) -> Sequence[int]:
        start = (len(request.prompt_token_ids) + 31 * choice) % len(words)
        return words[start:] + words[:start]

    return script


async def _serve(backend: FakeBackend) -> None:
    async with backend:
        click.echo(f"fake backend on {backend.target}")
        await asyncio.Event().wait()


@click.command()
@click.option("--tokenizer", type=click.Path(exists=True, file_okay=False, path_type=Path), required=True)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=50052, show_default=True)
@click.option("--interval", default=0.01, show_default=True, help="Seconds between steps.")
def main(tokenizer: Path, host: str, port: int, interval: float) -> None:
    """A backend without a model, for measuring a frontend alone."""
    asyncio.run(_serve(FakeBackend(tokenizer, interval=interval, address=f"{host}:{port}")))


if __name__ == "__main__":
    main()
