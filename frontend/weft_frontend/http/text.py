"""`POST /tokenize`, `POST /detokenize` and `POST /v1/embeddings`."""

from __future__ import annotations

from pydantic import Field

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.http.call import Call
from weft_frontend.http.fields import Body, FieldError, Items, TokenIds
from weft_frontend.http.messages import ChatMessage, Conversation


class TokenizeBody(Conversation):
    """Text, or a conversation through its template."""

    messages: Items[ChatMessage] = Field(default_factory=list)
    prompt: str | None = None
    model: str | None = None
    add_special_tokens: bool | None = None

    def request(self) -> pb.TokenizeRequest:
        """The request as the contract says it. Raises FieldError."""
        request = pb.TokenizeRequest(model=self.model or "")
        if (self.prompt is None) == (not self.messages):
            raise FieldError("prompt", "give either a prompt or messages")
        if self.prompt is not None:
            if of_messages := self.model_fields_set - {"prompt", "model", "add_special_tokens"}:
                raise FieldError(min(of_messages), "has no meaning beside a prompt")
            request.text = self.prompt
        else:
            request.chat.CopyFrom(self.conversation(self.model))
        if self.add_special_tokens is not None:
            request.add_special_tokens = self.add_special_tokens
        return request


class DetokenizeBody(Body):
    """Token ids."""

    tokens: TokenIds
    model: str | None = None
    skip_special_tokens: bool | None = None


async def tokenize(call: Call) -> None:
    """Answer with token ids."""
    body = await call.body(TokenizeBody)
    call.names = {"text": "prompt"}
    answer = await call.services.generation.tokenize(body.request())
    ids = list(answer.token_ids)
    await call.answer({"count": len(ids), "max_model_len": answer.max_model_len, "tokens": ids})


async def detokenize(call: Call) -> None:
    """Answer with text."""
    body = await call.body(DetokenizeBody)
    call.names = {"token_ids": "tokens"}
    request = pb.DetokenizeRequest(
        model=body.model or "", token_ids=body.tokens, skip_special_tokens=bool(body.skip_special_tokens)
    )
    answer = await call.services.generation.detokenize(request)
    await call.answer({"prompt": answer.text})


async def embeddings(call: Call) -> None:
    """Refused."""
    call.services.generation.embed()
