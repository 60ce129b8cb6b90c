"""A stand-in for the frontend: the public contract over a real socket, in a few lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import inference_pb2_grpc
from weft.inference.v1.output_pb2 import FINISH_REASON_LENGTH, Choice, TokenLogprob, Usage

MAX_MODEL_LEN = 64
VOCAB_SIZE = 256


class FakeService(inference_pb2_grpc.InferenceServiceServicer):
    """Tokens are bytes; an answer is the prompt's bytes in a circle. Statuses in ``failures`` are given first."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.failures: list[status_pb2.Status] = []
        self.fail_after_messages: int | None = None
        self.cancelled = threading.Event()
        self.hold = threading.Event()  # a stream goes on once it is set
        self.hold.set()

    def fail(
        self, code: grpc.StatusCode, message: str = "no", retry_after: float | None = None, field: str = ""
    ) -> None:
        """Answer the next call with this status."""
        details: list[Any] = [error_details_pb2.ErrorInfo(reason="A_REASON", domain="weft.dev")]
        if field:
            violation = error_details_pb2.BadRequest.FieldViolation(field=field)
            details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        if retry_after is not None:
            delay = Duration()
            delay.FromMilliseconds(int(1000 * retry_after))
            details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        packed = []
        for detail in details:
            packed.append(AnyMessage())
            packed[-1].Pack(detail)
        self.failures.append(status_pb2.Status(code=code.value[0], message=message, details=packed))

    def _note(self, request: Any, context: Any) -> None:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures:
            self._abort(context, self.failures.pop(0))

    def _abort(self, context: Any, status: status_pb2.Status) -> None:
        code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(code, status.message)

    def ListModels(self, request: Any, context: Any) -> pb.ListModelsResponse:
        self._note(request, context)
        return pb.ListModelsResponse(models=[pb.Model(id="echo", max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE)])

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        self._note(request, context)
        text = "".join(message.content for message in request.chat.messages) or request.text
        return pb.TokenizeResponse(token_ids=text.encode(), max_model_len=MAX_MODEL_LEN)

    def Detokenize(self, request: pb.DetokenizeRequest, context: Any) -> pb.DetokenizeResponse:
        self._note(request, context)
        return pb.DetokenizeResponse(text=bytes(request.token_ids).decode())

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        self._note(request, context)
        return pb.GenerateResponse(id="1", choices=_choices(request), usage=Usage(prompt_tokens=3))

    def Chat(self, request: pb.ChatRequest, context: Any) -> pb.ChatResponse:
        self._note(request, context)
        return pb.ChatResponse(id="1", choices=[Choice(text=request.messages[-1].content, role="assistant")])

    def StreamGenerate(self, request: pb.StreamGenerateRequest, context: Any) -> Iterator[pb.StreamGenerateResponse]:
        self._note(request, context)
        context.add_callback(self.cancelled.set)
        for number, message in enumerate(_messages(_choices(request.request))):
            if number == self.fail_after_messages:
                self.fail(grpc.StatusCode.UNAVAILABLE)
                self._abort(context, self.failures.pop())
            yield message
            self.hold.wait(10)

    def StreamChat(self, request: pb.StreamChatRequest, context: Any) -> Iterator[pb.StreamChatResponse]:
        self._note(request, context)
        for character in request.request.messages[-1].content:
            yield pb.StreamChatResponse(choices=[Choice(text=character, token_ids=[ord(character)])])


def _choices(request: pb.GenerateRequest) -> list[Choice]:
    """``max_tokens`` bytes of each prompt in a circle; choice k begins at its byte k."""
    choices = []
    n = request.sampling.n or 1
    for number, prompt in enumerate(request.prompts):
        source = list(prompt.text.encode()) if prompt.HasField("text") else list(prompt.token_ids.ids)
        for k in range(n):
            ids = [source[(k + i) % len(source)] for i in range(request.sampling.max_tokens or 16)]
            entries = [TokenLogprob(token_id=id, token=chr(id), logprob=-0.5, rank=1) for id in ids]
            choices.append(
                Choice(
                    index=number * n + k,
                    text=bytes(ids).decode("latin-1"),
                    token_ids=ids,
                    finish_reason=FINISH_REASON_LENGTH,
                    logprobs=entries if request.sampling.HasField("logprobs") else [],
                )
            )
    return choices


def _messages(choices: list[Choice]) -> Iterator[pb.StreamGenerateResponse]:
    """A token of every choice in each message; the choices of a message are in falling order."""
    num_messages = max(len(choice.token_ids) for choice in choices)
    for i in range(num_messages):
        parts = [
            Choice(
                index=choice.index,
                text=choice.text[i],
                token_ids=[choice.token_ids[i]],
                logprobs=choice.logprobs[i : i + 1],
                finish_reason=choice.finish_reason if i == len(choice.token_ids) - 1 else 0,  # type: ignore[arg-type]
            )
            for choice in reversed(choices)
            if i < len(choice.token_ids)
        ]
        num_tokens = sum(len(choice.token_ids) for choice in choices) if i == num_messages - 1 else 0
        yield pb.StreamGenerateResponse(id="1", choices=parts, usage=Usage(completion_tokens=num_tokens))


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def target(service: FakeService, tmp_path: Path) -> Iterator[str]:
    """Where ``service`` listens."""
    server = grpc.server(ThreadPoolExecutor(40))
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    address = f"unix:{tmp_path}/fake.sock"
    server.add_insecure_port(address)
    server.start()
    yield address
    server.stop(grace=None).wait()
