"""From a public request to a stream of text: everything that HTTP and gRPC share.

Both protocols bring the same messages of `weft.inference.v1`; from here there is one path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

from weft.engine.v1 import model_pb2
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1 import output_pb2

from weft_frontend.config import FrontendConfig


@dataclass(slots=True)
class TokenLogprob:
    """Log-probability of a token and of the likeliest ones in its place; fields as `weft.inference.v1.TokenLogprob`."""

    token_id: int
    token: str
    token_bytes: bytes
    logprob: float | None  # None for a prompt's first token
    rank: int
    top: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True)
class ChoiceDelta:
    """What is new in one choice since its last delta."""

    index: int  # prompt number * n + number of the choice within the prompt
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None  # set on the choice's last delta only
    stop_reason: str | int | None = None  # the stop string or one of stop_token_ids; None for end of sequence
    logprobs: list[TokenLogprob] | None = None  # one per token id, if sampling.logprobs was set
    prompt_logprobs: list[TokenLogprob] | None = None  # on the first delta, if sampling.prompt_logprobs was set


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """How a backend looks from here; for metrics."""

    target: str
    model: str  # the public name; "" until it is known
    ready: bool
    num_requests: int  # requests that this process has there now
    load: model_pb2.LoadReport | None  # the latest report of the current session


class GenerationStream:
    """The answer to one request, over all of its prompts and choices. One reader.

    ``next`` gives what is new; a reader that lags gets merged deltas. With ``stream=False`` there is one item, with
    everything. Always call ``close`` in a ``finally``: it cancels what still runs, and does nothing otherwise.
    """

    id: str
    created: int  # Unix time, in seconds
    model: str
    num_choices: int

    async def next(self) -> list[ChoiceDelta] | None:
        """The deltas of all choices with something new, by readiness; None at the end.

        Raises:
            WeftError: the request failed; what came before is not a whole answer.
        """

    @property
    def usage(self) -> output_pb2.Usage:
        """Tokens used so far; final after ``next`` returned None."""

    @property
    def timings(self) -> output_pb2.Timings:
        """Where the time went, of the slowest prompt; zeros before the end."""

    def close(self) -> None:
        """Cancel what still runs. Idempotent."""


class Generation:
    """Serves requests over the backends of a configuration; an async context manager."""

    def __init__(self, config: FrontendConfig) -> None: ...

    async def __aenter__(self) -> Generation:
        """Start connecting; does not wait for backends (see ``ready``, ``wait_ready``)."""

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close all sessions; running requests fail with Unavailable."""

    @property
    def ready(self) -> bool:
        """At least one model can be used now."""

    async def wait_ready(self) -> None:
        """Return as soon as every configured backend has been seen ready once."""

    async def generate(
        self, request: pb.GenerateRequest, *, stream: bool, time_left: float | None = None
    ) -> GenerationStream:
        """Complete prompts. Choice index is prompt number * n + number of the choice.

        With ``echo`` a choice's first delta starts with the prompt's text; ``sampling.prompt_logprobs`` is what asks
        for the prompt's log-probabilities (OpenAI's echo + logprobs means that both are set).

        Args:
            stream: deltas as they come; needs ``best_of`` at most ``n``.
            time_left: seconds until the request's deadline; None: no deadline.

        Raises:
            WeftError: before anything was generated.
        """

    async def chat(self, request: pb.ChatRequest, *, stream: bool, time_left: float | None = None) -> GenerationStream:
        """Answer a conversation; as ``generate``."""

    async def tokenize(self, request: pb.TokenizeRequest) -> pb.TokenizeResponse: ...

    async def detokenize(self, request: pb.DetokenizeRequest) -> pb.DetokenizeResponse: ...

    def list_models(self) -> pb.ListModelsResponse:
        """The models served now, in alphabetical order."""

    async def reset_prefix_cache(self) -> int:
        """Forget cached prefixes on every ready backend; the number of pages that held one."""

    def backends(self) -> list[BackendStatus]:
        """Every configured backend, in the order of the configuration."""
