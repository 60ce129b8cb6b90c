"""The calls of the public contract, built from plain Python values: what the sync and the async client share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypedDict, TypeVar

from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from weft.conversation import MessageLike, ToolLike, as_message, as_tool, as_tool_choice
from weft.inference.v1 import inference_pb2 as pb
from weft.sampling_params import SamplingParams

SERVICE = "weft.inference.v1.InferenceService"

# Text, token ids, or a dict with "prompt" or "prompt_token_ids".
PromptLike = str | Sequence[int] | Mapping[str, Any]

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
    return Call("Chat", _chat_request(messages, sampling, options), pb.ChatResponse, options.get("timeout"))


def stream_chat(
    messages: Sequence[MessageLike], sampling: SamplingParams | None, options: ChatOptions
) -> Call[pb.StreamChatResponse]:
    """Answer a conversation, in a stream."""
    request = pb.StreamChatRequest(request=_chat_request(messages, sampling, options))
    return Call("StreamChat", request, pb.StreamChatResponse, options.get("timeout"))


def tokenize(text: str, add_special_tokens: bool | None, options: CallOptions) -> Call[pb.TokenizeResponse]:
    """Text to token ids."""
    request = pb.TokenizeRequest(model=options.get("model", ""), text=text)
    if add_special_tokens is not None:
        request.add_special_tokens = add_special_tokens
    return Call("Tokenize", request, pb.TokenizeResponse, options.get("timeout"))


def tokenize_chat(messages: Sequence[MessageLike], options: TemplateOptions) -> Call[pb.TokenizeResponse]:
    """A conversation, through its template, to token ids."""
    request = pb.TokenizeRequest(model=options.get("model", ""), chat=_chat_request(messages, None, options))
    return Call("Tokenize", request, pb.TokenizeResponse, options.get("timeout"))


def detokenize(
    token_ids: Sequence[int], skip_special_tokens: bool, options: CallOptions
) -> Call[pb.DetokenizeResponse]:
    """Token ids to text."""
    request = pb.DetokenizeRequest(
        model=options.get("model", ""), token_ids=token_ids, skip_special_tokens=skip_special_tokens
    )
    return Call("Detokenize", request, pb.DetokenizeResponse, options.get("timeout"))


def list_models() -> Call[pb.ListModelsResponse]:
    """The models served now."""
    return Call("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse, None)


def as_list(prompts: PromptLike | Sequence[PromptLike]) -> list[PromptLike]:
    """One prompt or several, as a list; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def prompt_parts(prompt: PromptLike) -> tuple[str | None, Sequence[int] | None]:
    """A prompt's text and its token ids, of which one or both are set. Raises TypeError."""
    if isinstance(prompt, str):
        return prompt, None
    if not isinstance(prompt, Mapping):
        return None, prompt
    text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if text is None and token_ids is None:
        raise TypeError('prompts: a dict needs "prompt" or "prompt_token_ids"')
    return text, token_ids


def _as_prompt(prompt: PromptLike) -> pb.Prompt:
    text, token_ids = prompt_parts(prompt)
    return pb.Prompt(text=text) if token_ids is None else pb.Prompt(token_ids=pb.TokenIds(ids=token_ids))


_REQUEST_OPTIONS = ("request_id", "priority", "cache_salt", "adapter", "user")


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], pb.RequestOptions]:
    """The options that are fields of the request, and those that are fields of its RequestOptions."""
    common = {name: options[name] for name in _REQUEST_OPTIONS if name in options}
    fields = {name: value for name, value in options.items() if name not in common and name != "timeout"}
    return fields, pb.RequestOptions(**common)


def _generate_request(
    prompts: PromptLike | Sequence[PromptLike], sampling: SamplingParams | None, options: RequestOptions
) -> pb.GenerateRequest:
    fields, common = _split(options)
    return pb.GenerateRequest(
        prompts=[_as_prompt(prompt) for prompt in as_list(prompts)],
        sampling=sampling.to_proto() if sampling else None,
        options=common,
        **fields,
    )


def _chat_request(
    messages: Sequence[MessageLike], sampling: SamplingParams | None, options: ChatOptions | TemplateOptions
) -> pb.ChatRequest:
    fields, common = _split(options)
    tools, choice = fields.pop("tools", ()), fields.pop("tool_choice", None)
    template_args = Struct()
    template_args.update(fields.pop("template_args", {}))
    return pb.ChatRequest(
        messages=[as_message(message) for message in messages],
        sampling=sampling.to_proto() if sampling else None,
        tools=[as_tool(tool) for tool in tools],
        tool_choice=None if choice is None else as_tool_choice(choice),
        template_args=template_args,
        options=common,
        **fields,
    )
