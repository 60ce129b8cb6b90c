"""The fields of every generation request, and the protobuf messages they become."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft_frontend.http.fields import Body, Int32, Int64, Items, LogitBias, Strings, TokenIds, Uint32
from weft_frontend.http.grammars import NamedGrammar, StructuredFields, named_grammars, only_grammar


class StreamOptions(Body):
    """What a stream reports beside its text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = None  # as happens anyway


class GenerationFields(Body):
    """The fields that completions, chat and the plain API share."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: Int64 | None = None
    n: Uint32 | None = None
    best_of: Uint32 | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | None = None
    stop: Strings | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Uint32 | None = None
    max_tokens: Uint32 | None = None
    prompt_logprobs: Uint32 | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: Items[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: Literal[True] | None = None  # as happens anyway
    structured_outputs: StructuredFields | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None
    model: str | None = None
    stream: bool | None = None
    user: str | None = None
    safety_identifier: str | None = None  # says who the user is; changes nothing
    prompt_cache_key: str | None = None  # a hint for routing; changes nothing
    priority: Int32 | None = None
    cache_salt: str | None = None
    adapter: str | None = None
    request_id: str | None = None

    # The same in the contract.
    _SHARED: ClassVar[set[str]] = {
        *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        *("seed", "n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "include_stop_str_in_output"),
        *("ignore_eos", "min_tokens", "max_tokens", "prompt_logprobs", "skip_special_tokens", "logit_bias"),
        *("stop", "stop_token_ids", "allowed_token_ids", "bad_words"),
    }

    def sampling(self) -> SamplingParams:
        """The sampling parameters that were given. Raises FieldError for two grammars."""
        params = SamplingParams(**{name: getattr(self, name) for name in self.model_fields_set & self._SHARED})
        structured = only_grammar(self.grammars())
        if structured is not None:
            params.structured_output.CopyFrom(structured)
        return params

    def options(self, request_id: str) -> pb.RequestOptions:
        """The rest; ``request_id`` is the header's or made up, and the body's comes first."""
        return pb.RequestOptions(
            request_id=self.request_id or request_id,
            priority=self.priority or 0,
            cache_salt=self.cache_salt or "",
            adapter=self.adapter or "",
            user=self.user or "",
        )

    def grammars(self) -> list[NamedGrammar]:
        """Every grammar the request names, with the field that names it."""
        guided: dict[str, Any] = {"json": self.guided_json, "regex": self.guided_regex}
        guided |= {"choice": self.guided_choice, "grammar": self.guided_grammar}
        outputs = self.structured_outputs
        return named_grammars("guided_", guided) + (outputs.named() if outputs is not None else [])

    def names(self) -> dict[str, str]:
        """Fields of the contract that this request gave under another name."""
        grammars = self.grammars()
        return {"structured_output": grammars[0][0]} if grammars else {}
