"""`POST /generate`: a prompt in, texts out; the API of vLLM's demonstration server."""

from __future__ import annotations

import orjson

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.http.body import FORM, JSON
from weft_frontend.http.call import Call
from weft_frontend.http.sampling import GenerationFields
from weft_frontend.metrics import MeasuredStream

ANY_TYPE = (JSON, FORM, "")  # `curl -d` calls every body a form


class GenerateBody(GenerationFields):
    """A prompt, and how to go on from it."""

    prompt: str
    prompt_logprobs: None = None  # answers are texts alone

    def request(self, request_id: str) -> pb.GenerateRequest:
        """The request as the contract says it; every text starts with the prompt. Raises FieldError."""
        return pb.GenerateRequest(
            model=self.model or "",
            prompts=[pb.Prompt(text=self.prompt)],
            sampling=self.sampling(),
            echo=True,
            options=self.options(request_id),
        )


async def generate(call: Call) -> None:
    """Answer `{"text": [prompt + output, …]}`; in a stream, one such line whenever texts have grown."""
    body = await call.body(GenerateBody, ANY_TYPE)
    call.names = body.names()
    request = body.request(call.request_id)
    async with call.while_connected():
        stream = await call.services.measured.generate(request, stream=bool(body.stream))
        try:
            if body.stream:
                await _answer_lines(call, stream, body.prompt)
            else:
                await call.answer({"text": await _texts(stream)})
        finally:
            stream.close()


async def _texts(stream: MeasuredStream) -> list[str]:
    texts = [""] * stream.num_choices
    while (deltas := await stream.next()) is not None:
        for delta in deltas:
            texts[delta.index] += delta.text
    return texts


async def _answer_lines(call: Call, stream: MeasuredStream, prompt: str) -> None:
    texts = [""] * stream.num_choices
    sent = b""
    deltas = await stream.next()
    await call.start_stream(b"application/x-ndjson", b"%s\n")
    while deltas is not None:
        for delta in deltas:
            texts[delta.index] += delta.text
        line = orjson.dumps({"text": [text or prompt for text in texts]}) + b"\n"
        if line != sent:
            await call.send({"type": "http.response.body", "body": line, "more_body": True})
            sent = line
        deltas = await stream.next()
    await call.send({"type": "http.response.body", "body": b""})
