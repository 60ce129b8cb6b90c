"""The calls of the public contract, built from plain Python values: what the sync and the async client share.

What cannot be sent raises InvalidRequest, which names the argument, and an option that there is not TypeError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf.message import Message

from weft.conversation import MessageLike, ToolLike, as_message, as_tool, as_tool_choice
from weft.errors import naming, refused
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import sampling_pb2
from weft.sampling_params import SamplingParams

SERVICE = "weft.inference.v1.InferenceService"

# Text, token ids, or a dict with "prompt" or "prompt_token_ids".
PromptLike = str | Sequence[int] | Mapping[str, Any]
_PROMPT = 'must be text, token ids, or a dict with "prompt" or "prompt_token_ids" and nothing else'

Response = TypeVar("Response", bound=Message)


class CallOptions(TypedDict, total=False):
    """What every call may carry."""

    model: str  # default: the only model
    timeout: float  # seconds for the whole call, with its retries


class RequestOptions(CallOptions, total=False):
    """What every generation request may carry; see weft.inference.v1.RequestOptions."""

    request_id: str
    priority: int
    cache_salt: str
    adapter: str
    user: str
    echo: bool


class TemplateOptions(CallOptions, total=False):
    """What decides how a conversation becomes a prompt."""

    tools: Sequence[ToolLike]
    template_args: Mapping[str, Any]
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template: str


class ChatOptions(RequestOptions, TemplateOptions, total=False):
    """What a request to answer a conversation may carry besides it."""

    tool_choice: str | Mapping[str, Any]  # "none", "auto", "required", or as OpenAI's API names a function


@dataclass(frozen=True, slots=True)
class Call(Generic[Response]):
    """One call: a method, its request, and how to read its answer."""

    method: str
    request: Message
    response: type[Response]
    timeout: float | None

    @property
    def wire(self) -> tuple[str, Any, Any]:
        """What a channel needs: the method's path, and how to write and read its messages."""
        return f"/{SERVICE}/{self.method}", type(self.request).SerializeToString, self.response.FromString


def generate(
    prompts: PromptLike | Sequence[PromptLike], sampling: SamplingParams | None, options: RequestOptions
) -> Call[pb.GenerateResponse]:
    """Complete one prompt or several."""
    request = _generate_request(prompts, sampling, options)
    return Call("Generate", request, pb.GenerateResponse, options.get("timeout"))


def stream_generate(
    prompts: PromptLike | Sequence[PromptLike], sampling: SamplingParams | None, options: RequestOptions
) -> Call[pb.StreamGenerateResponse]:
    """Complete one prompt or several, in a stream."""
    request = pb.StreamGenerateRequest(request=_generate_request(prompts, sampling, options))
    return Call("StreamGenerate", request, pb.StreamGenerateResponse, options.get("timeout"))


def chat(
    messages: Sequence[MessageLike], sampling: SamplingParams | None, options: ChatOptions
) -> Call[pb.ChatResponse]:
    """Answer a conversation."""
    request = _chat_request(messages, sampling, options, ChatOptions.__optional_keys__)
    return Call("Chat", request, pb.ChatResponse, options.get("timeout"))


def stream_chat(
    messages: Sequence[MessageLike], sampling: SamplingParams | None, options: ChatOptions
) -> Call[pb.StreamChatResponse]:
    """Answer a conversation, in a stream."""
    request = pb.StreamChatRequest(request=_chat_request(messages, sampling, options, ChatOptions.__optional_keys__))
    return Call("StreamChat", request, pb.StreamChatResponse, options.get("timeout"))


def tokenize(text: str, add_special_tokens: bool | None, options: CallOptions) -> Call[pb.TokenizeResponse]:
    """Text to token ids."""
    _check_options(options, CallOptions.__optional_keys__)
    request = pb.TokenizeRequest()
    _set(request, {**options, "text": text, "add_special_tokens": add_special_tokens})
    return Call("Tokenize", request, pb.TokenizeResponse, options.get("timeout"))


def tokenize_chat(messages: Sequence[MessageLike], options: TemplateOptions) -> Call[pb.TokenizeResponse]:
    """A conversation, through its template, to token ids."""
    chat = _chat_request(messages, None, options, TemplateOptions.__optional_keys__)
    request = pb.TokenizeRequest(model=chat.model, chat=chat)
    return Call("Tokenize", request, pb.TokenizeResponse, options.get("timeout"))


def detokenize(
    token_ids: Sequence[int], skip_special_tokens: bool, options: CallOptions
) -> Call[pb.DetokenizeResponse]:
    """Token ids to text."""
    _check_options(options, CallOptions.__optional_keys__)
    request = pb.DetokenizeRequest()
    _set(request, {**options, "skip_special_tokens": skip_special_tokens})
    with naming("token_ids"):
        request.token_ids.extend(token_ids)
    return Call("Detokenize", request, pb.DetokenizeResponse, options.get("timeout"))


def list_models() -> Call[pb.ListModelsResponse]:
    """The models served now."""
    return Call("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse, None)


def as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise refused("prompts", f"{_PROMPT}, or a list of these")
    return [prompts] if prompts and isinstance(prompts[0], int) else list(prompts)  # type: ignore[list-item, arg-type]


def prompt_parts(prompt: PromptLike) -> tuple[str | None, Iterable[int] | None]:
    """A prompt's text and its token ids, of which one or both are set. Raises ValueError."""
    if not isinstance(prompt, Mapping):
        prompt = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    given = {name: value for name, value in prompt.items() if value is not None}
    text, token_ids = given.pop("prompt", None), given.pop("prompt_token_ids", None)
    if (
        given
        or (text is None and token_ids is None)
        or not isinstance(text, str | None)
        or not isinstance(token_ids, Iterable | None)
        or isinstance(token_ids, str | bytes)
    ):
        raise ValueError(_PROMPT)
    return text, token_ids


def as_prompt(prompt: PromptLike, field: str) -> pb.Prompt:
    """A prompt's token ids, or its text if it has none."""
    with naming(field):
        text, token_ids = prompt_parts(prompt)
        return pb.Prompt(text=text) if token_ids is None else pb.Prompt(token_ids=pb.TokenIds(ids=token_ids))


def check_messages(messages: object) -> None:
    """Refuse what is no list."""
    if not isinstance(messages, Iterable) or isinstance(messages, str | bytes | Mapping):
        raise refused("messages", 'must be a list of dicts with "role" and "content"')


def _as_sampling(sampling: SamplingParams | None) -> sampling_pb2.SamplingParams | None:
    if not isinstance(sampling, SamplingParams | None):
        raise refused("sampling", f"must be SamplingParams, not {type(sampling).__name__}")
    return None if sampling is None else sampling.to_proto()


_REQUEST_OPTIONS = frozenset(pb.RequestOptions.DESCRIPTOR.fields_by_name)
_COMPOSITE = {"timeout", "tools", "tool_choice", "template_args"}  # are set where they are understood


def _check_options(options: Mapping[str, object], known: frozenset[str]) -> None:
    if unknown := options.keys() - known:
        raise TypeError(f"there is no option {min(unknown)}; there are {', '.join(sorted(known))}")


def _set(request: Any, fields: Mapping[str, object]) -> None:
    """Set scalar fields of the request or of its RequestOptions; None leaves one unset."""
    for name, value in fields.items():
        if value is not None and name not in _COMPOSITE:
            with naming(name):
                setattr(request.options if name in _REQUEST_OPTIONS else request, name, value)


def _generate_request(
    prompts: PromptLike | Sequence[PromptLike], sampling: SamplingParams | None, options: RequestOptions
) -> pb.GenerateRequest:
    _check_options(options, RequestOptions.__optional_keys__)
    request = pb.GenerateRequest(
        prompts=[as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(as_list(prompts))],
        sampling=_as_sampling(sampling),
    )
    _set(request, options)
    return request


def _chat_request(
    messages: Sequence[MessageLike],
    sampling: SamplingParams | None,
    options: Mapping[str, Any],
    known: frozenset[str],
) -> pb.ChatRequest:
    _check_options(options, known)
    check_messages(messages)
    request = pb.ChatRequest(sampling=_as_sampling(sampling))
    _set(request, options)
    for index, message in enumerate(messages):
        with naming(f"messages[{index}]"):
            request.messages.append(as_message(message))
    with naming("tools"):
        request.tools.extend(as_tool(tool) for tool in options.get("tools") or ())
    with naming("template_args"):
        request.template_args.update(options.get("template_args") or {})
    with naming("tool_choice"):
        if options.get("tool_choice") is not None:
            request.tool_choice.CopyFrom(as_tool_choice(options["tool_choice"]))
    return request
