"""LLM against a server that answers with the prompt's own bytes."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from weft import LLM, SamplingParams
from weft.calls import PromptLike
from weft.errors import InvalidRequest, WeftError


@pytest.fixture
def llm(target: str) -> Any:
    with LLM(target=target) as llm:
        yield llm


def test_outputs_are_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts: list[PromptLike] = ["Hello", [99, 100], {"prompt": "x"}, {"prompt_token_ids": [101], "prompt": "e"}]
    outputs = llm.generate(prompts, SamplingParams(max_tokens=6), use_tqdm=False)
    assert [output.prompt for output in outputs] == ["Hello", None, "x", "e"]
    assert [output.prompt_token_ids for output in outputs] == [list(b"Hello"), [99, 100], [120], [101]]
    assert [output.outputs[0].text for output in outputs] == ["HelloH", "cdcdcd", "xxxxxx", "eeeeee"]
    assert all(output.finished and output.outputs[0].finish_reason == "length" for output in outputs)
    assert [output.outputs[0].token_ids for output in outputs][1] == [99, 100] * 3


def test_a_key_goes_to_a_running_service(service: Any, target: str) -> None:
    with LLM(target=target, api_key="k") as llm:
        llm.generate("a", SamplingParams(max_tokens=1), use_tqdm=False)
    assert {metadata["authorization"] for metadata in service.metadata} == {"Bearer k"}
    with pytest.raises(TypeError, match="api_key"):
        LLM(api_key="k")


def test_one_params_for_each(llm: LLM, service: Any) -> None:
    params = [SamplingParams(max_tokens=1 + i % 3, n=1 + i % 2) for i in range(12)]
    outputs = llm.generate([f"{i:02}" for i in range(12)], params, use_tqdm=False)
    for i, output in enumerate(outputs):
        assert [choice.index for choice in output.outputs] == list(range(1 + i % 2))
        assert output.outputs[0].text == f"{i:02}{i:02}"[: 1 + i % 3]
    streams = [request for request in service.requests if request.DESCRIPTOR.name == "StreamGenerateRequest"]
    assert len(streams) == 6, "prompts of equal parameters share a stream"
    with pytest.raises(InvalidRequest, match="2 for 1 prompts"):
        llm.generate(["a"], params[:2])


def test_many_prompts_are_split(llm: LLM, service: Any) -> None:
    outputs = llm.generate([[1 + i % 200] for i in range(1500)], SamplingParams(max_tokens=1), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [[1 + i % 200] for i in range(1500)]
    sizes = [len(r.request.prompts) for r in service.requests if r.DESCRIPTOR.name == "StreamGenerateRequest"]
    assert sum(sizes) == 1500
    assert max(sizes) <= 1024


def test_logprobs_are_summed(llm: LLM) -> None:
    completion = llm.generate("ab", SamplingParams(max_tokens=4, logprobs=0), use_tqdm=False)[0].outputs[0]
    assert completion.cumulative_logprob == -2.0
    assert completion.logprobs is not None
    assert [list(entry) for entry in completion.logprobs] == [[97], [98], [97], [98]]
    assert completion.logprobs[0][97].decoded_token == "a"


def test_chat_takes_one_conversation_or_several(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    params = SamplingParams(max_tokens=2)
    assert [output.outputs[0].text for output in llm.chat(one, params, use_tqdm=False)] == ["hi"]
    outputs = llm.chat([one, [{"role": "user", "content": "yo"}]], params, use_tqdm=False)
    assert [output.outputs[0].text for output in outputs] == ["hi", "yo"]
    assert outputs[1].prompt_token_ids == list(b"yo")


def test_the_bar_counts_requests_and_tokens(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b", "c"], SamplingParams(max_tokens=4))
    assert "3/3" in (shown := capsys.readouterr().err)
    assert "tok/s" in shown


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[97], []], r"prompts\[1\]: must not be empty"),
        ([[97], [256]], r"prompts\[1\]: ids must be in \[0, 255\]"),
        ([[1] * 64], r"prompts\[0\]: has 64 tokens; this model takes at most 63"),
        (5, "prompts: must be text, token ids, or a dict"),
        (["a", None], r"prompts\[1\]: must be text"),
        (["a", [-1]], r"prompts\[1\]: Value out of range"),
    ],
)
def test_bad_prompts_are_named_by_their_place(llm: LLM, prompts: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{message}"):
        llm.generate(prompts, use_tqdm=False)


@pytest.mark.parametrize("messages", ["hi", 5, None, {"role": "user", "content": "hi"}, ["hi"], [["hi"]]])
def test_what_is_no_conversation_is_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages.*: must be a .*dict"):
        llm.chat(messages)


@pytest.mark.parametrize("params", [5, {"temperature": 0}, [None], "a"])
def test_parameters_of_a_wrong_type_are_refused(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^sampling_params: must be SamplingParams"):
        llm.generate("a", params)


def test_an_error_of_the_service_is_raised_and_the_llm_lives(llm: LLM, service: Any) -> None:
    service.fail(grpc.StatusCode.INVALID_ARGUMENT, "top_p is wrong", field="sampling.top_p")
    with pytest.raises(InvalidRequest, match="top_p is wrong"):
        llm.generate([[97], [98]], use_tqdm=False)
    assert llm.generate([[97]], SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0].text == "a"


def test_a_full_service_is_asked_again(llm: LLM, service: Any) -> None:
    service.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.05)
    service.fail(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after=0.05)
    assert llm.generate([[97]], SamplingParams(max_tokens=2), use_tqdm=False)[0].outputs[0].text == "aa"


async def test_it_works_where_a_loop_runs(target: str) -> None:
    with LLM(target=target) as llm:
        assert llm.generate([[97]], SamplingParams(max_tokens=1), use_tqdm=False)[0].outputs[0].text == "a"


def test_an_unknown_model_and_useless_options_are_refused(target: str) -> None:
    with pytest.raises(InvalidRequest, match="echo"):
        LLM("other", target=target)
    with pytest.raises(TypeError, match="dtype"):
        LLM(target=target, dtype="float32")


def test_closing_twice(target: str) -> None:
    llm = LLM(target=target)
    llm.close()
    llm.close()
    with pytest.raises(WeftError, match="closed"):
        llm.generate("a")
