"""Requests over real sockets, to fake backends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from small_tokenizers import byte_level_tokenizer, tokenizer_files
from waiting import until

from weft.engine.v1 import engine_pb2 as engine
from weft.engine.v1.model_pb2 import Limits, ModelCard, SamplingDefaults
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft.testing import FakeBackend, Script
from weft_frontend import errors
from weft_frontend.generation import ChoiceDelta, Generation, GenerationStream

RAW = byte_level_tokenizer()
EOS = RAW.token_to_id("<|im_end|>")
Serve = Callable[..., Any]


def ids(text: str) -> list[int]:
    """A text's token ids."""
    token_ids: list[int] = RAW.encode(text).ids
    return token_ids


def saying(text: str) -> Script:
    """Generates a text, then the end of sequence."""
    return lambda request, choice: [*ids(text), EOS]


def ask(text: str = "Hello", **sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(
        prompts=[pb.Prompt(text=text)], sampling=SamplingParams(**({"max_tokens": 64} | sampling))
    )


async def collect(stream: GenerationStream) -> dict[int, ChoiceDelta]:
    """The whole of each choice, by index."""
    whole: dict[int, ChoiceDelta] = {}
    while (deltas := await stream.next()) is not None:
        for delta in deltas:
            choice = whole.setdefault(delta.index, ChoiceDelta(delta.index))
            assert choice.finish_reason is None, "nothing follows the end"
            choice.text += delta.text
            choice.token_ids += delta.token_ids
            choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            choice.logprobs = (choice.logprobs or []) + delta.logprobs if delta.logprobs else choice.logprobs
            choice.prompt_logprobs = choice.prompt_logprobs or delta.prompt_logprobs
    return whole


async def answer(generation: Generation, request: pb.GenerateRequest, stream: bool = False) -> dict[int, ChoiceDelta]:
    return await collect(await generation.generate(request, stream=stream))


@pytest.mark.parametrize("streaming", [False, True])
async def test_a_completion(byte_level_files: dict[str, bytes], serve: Serve, streaming: bool) -> None:
    async with FakeBackend(byte_level_files, saying("日本語 😀 Paris")) as fake, serve(fake) as generation:
        stream = await generation.generate(ask(), stream=streaming)
        (choice,) = (await collect(stream)).values()
        assert choice.text == "日本語 😀 Paris"
        assert choice.token_ids == [*ids("日本語 😀 Paris"), EOS]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", None)
        usage = stream.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids("Hello")), len(choice.token_ids))
        assert (stream.model, stream.num_choices) == ("fake", 1)
        assert fake.num_running == 0


async def test_deltas_come_as_tokens_do(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, interval=0.005) as fake, serve(fake) as generation:
        stream = await generation.generate(ask(max_tokens=8), stream=True)
        sizes = []
        while (deltas := await stream.next()) is not None:
            sizes.append([len(delta.token_ids) for delta in deltas])
        assert len(sizes) > 4


async def test_a_reader_that_lags_gets_merged_deltas(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        stream = await generation.generate(ask(max_tokens=8), stream=True)
        await until(lambda: stream.usage.completion_tokens == 8)
        first = await stream.next()
        assert first is not None
        assert len(first) == 1
        assert (len(first[0].token_ids), first[0].finish_reason) == (8, "length")
        assert await stream.next() is None


async def test_prompts_and_choices(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    def script(request: engine.TokenRequest, choice: int) -> list[int]:
        return [*ids(f"{RAW.decode(list(request.prompt_token_ids))}-{choice}"), EOS]

    async with FakeBackend(byte_level_files, script) as fake, serve(fake) as generation:
        request = ask("Paris", n=2)
        request.prompts.add().token_ids.ids.extend(ids("Tokyo"))
        choices = await answer(generation, request, stream=True)
        assert {index: choice.text for index, choice in choices.items()} == {
            0: "Paris-0",
            1: "Paris-1",
            2: "Tokyo-0",
            3: "Tokyo-1",
        }


async def test_stop_strings_end_at_the_backend_too(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        whole = (await answer(generation, ask()))[0]
        stop = whole.text[20:26]
        stream = await generation.generate(ask(stop=[stop]), stream=True)
        (choice,) = (await collect(stream)).values()
        assert choice.text == whole.text[: whole.text.index(stop)]
        assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)
        assert stream.usage.completion_tokens == len(choice.token_ids) < 64
        await settled(fake)
        assert fake.num_cancelled == 1


async def settled(fake: FakeBackend) -> None:
    """Returns when nothing runs at the backend."""
    await until(lambda: not fake.num_running)


async def test_stop_token_ids_are_no_text(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, saying("Paris!")) as fake, serve(fake) as generation:
        stop = ids("!")[0]
        choice = (await answer(generation, ask(stop_token_ids=[stop])))[0]
        assert (choice.text, choice.finish_reason, choice.stop_reason) == ("Paris", "stop", stop)
        assert choice.token_ids[-1] == stop
        kept = await answer(generation, ask(stop_token_ids=[stop], include_stop_str_in_output=True))
        assert kept[0].text == "Paris!"


@pytest.mark.parametrize("streaming", [False, True])
async def test_logprobs(byte_level_files: dict[str, bytes], serve: Serve, streaming: bool) -> None:
    async with FakeBackend(byte_level_files, saying("日本 Paris")) as fake, serve(fake) as generation:
        request = ask("Hello", logprobs=2, prompt_logprobs=1)
        choice = (await answer(generation, request, stream=streaming))[0]
        assert choice.logprobs is not None
        assert [entry.token_id for entry in choice.logprobs] == choice.token_ids
        assert b"".join(entry.token_bytes for entry in choice.logprobs[:-1]).decode() == choice.text
        assert all(entry.logprob == -1 and entry.rank == 1 and len(entry.top) == 2 for entry in choice.logprobs)
        assert [top.rank for top in choice.logprobs[0].top] == [1, 2]
        prompt = choice.prompt_logprobs
        assert prompt is not None
        assert [entry.token_id for entry in prompt] == ids("Hello")
        assert prompt[0].logprob is None
        assert all(entry.logprob == -1 and len(entry.top) == 1 for entry in prompt[1:])


async def test_logprobs_end_where_the_stop_string_does(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        stop = (await answer(generation, ask()))[0].text[20:26]
        choice = (await answer(generation, ask(stop=[stop], logprobs=0)))[0]
        assert choice.logprobs is not None
        assert len(choice.logprobs) == len(choice.token_ids)


async def test_best_of_returns_the_likeliest(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    def script(request: engine.TokenRequest, choice: int) -> list[int]:
        return [*ids(f"choice {choice}"), EOS]

    async with FakeBackend(byte_level_files, script) as fake, serve(fake) as generation:
        request = ask(n=2, best_of=4)
        request.prompts.add(text="Paris")
        stream = await generation.generate(request, stream=False)
        choices = await collect(stream)
        # The fake's later choices are likelier.
        assert {i: choice.text for i, choice in choices.items()} == {
            **{0: "choice 3", 1: "choice 2"},
            **{2: "choice 3", 3: "choice 2"},
        }
        assert choices[0].logprobs is None
        assert stream.usage.completion_tokens == 8 * len(choices[0].token_ids)
        with pytest.raises(errors.InvalidRequest) as caught:
            await generation.generate(request, stream=True)
        assert caught.value.field == "sampling.best_of"


@pytest.mark.parametrize("streaming", [False, True])
async def test_echo(byte_level_files: dict[str, bytes], serve: Serve, streaming: bool) -> None:
    async with FakeBackend(byte_level_files, saying(" Paris")) as fake, serve(fake) as generation:
        request = ask("the capital is")
        request.echo = True
        assert (await answer(generation, request, streaming))[0].text == "the capital is Paris"
        request.sampling.max_tokens = 0
        request.sampling.prompt_logprobs = 0
        choice = (await answer(generation, request, streaming))[0]
        assert (choice.text, choice.token_ids, choice.finish_reason) == ("the capital is", [], "length")
        assert choice.prompt_logprobs is not None
        assert len(choice.prompt_logprobs) == len(ids("the capital is"))


async def test_closing_cancels(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        request = ask(max_tokens=4000)
        request.prompts.add(text="Paris")
        stream = await generation.generate(request, stream=True)
        await stream.next()
        stream.close()
        stream.close()
        await settled(fake)
        assert fake.num_cancelled == 2
        with pytest.raises(errors.Cancelled):
            await stream.next()
        assert (await answer(generation, ask(max_tokens=4)))[0].finish_reason == "length"


async def test_chat(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, saying("Paris.")) as fake, serve(fake) as generation:
        request = pb.ChatRequest(messages=[pb.Message(role="user", content="Hello<|im_end|>")])
        choices = await collect(await generation.chat(request, stream=True))
        assert choices[0].text == "Paris."
        (submitted,) = fake.requests
        prompt = list(submitted.prompt_token_ids)
        assert RAW.decode(prompt, skip_special_tokens=False) == (
            "<|im_start|>user\nHello<|im_end|><|im_end|>\n<|im_start|>assistant\n"
        )
        assert prompt.count(EOS) == 1  # the template's; the user's is text
        assert submitted.sampling.max_tokens == 4096 - len(prompt)  # what fits
        tokenized = await generation.tokenize(pb.TokenizeRequest(chat=request))
        assert list(tokenized.token_ids) == prompt


async def test_chat_goes_on_with_the_last_message(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, saying(" Paris.")) as fake, serve(fake) as generation:
        request = pb.ChatRequest(
            messages=[pb.Message(role="user", content="the capital?"), pb.Message(role="assistant", content="It is")],
            add_generation_prompt=False,
            continue_final_message=True,
            echo=True,
        )
        choices = await collect(await generation.chat(request, stream=False))
        assert choices[0].text == "It is Paris."
        prompt = RAW.decode(list(fake.requests[0].prompt_token_ids), skip_special_tokens=False)
        assert prompt.endswith("<|im_start|>assistant\nIt is")


async def test_tokenize_and_detokenize(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        tokenized = await generation.tokenize(pb.TokenizeRequest(text="日本語 Paris<|im_end|>"))
        assert list(tokenized.token_ids) == ids("日本語 Paris<|im_end|>")
        assert tokenized.max_model_len == 4096
        request = pb.DetokenizeRequest(token_ids=tokenized.token_ids, skip_special_tokens=True)
        assert (await generation.detokenize(request)).text == "日本語 Paris"


async def test_the_models_defaults_apply(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    card = ModelCard(default_sampling=SamplingDefaults(temperature=0.5, top_k=7))
    async with FakeBackend(byte_level_files, card=card) as fake, serve(fake) as generation:
        request = ask(top_k=3, stop_token_ids=[5], logit_bias={4: 1.5}, seed=-1, max_tokens=2)
        request.options.priority = 4
        request.options.cache_salt = "tenant"
        request.options.request_id = "mine"
        stream = await generation.generate(request, stream=False, time_left=5)
        await collect(stream)
        (submitted,) = fake.requests
        sampling = submitted.sampling
        assert (sampling.temperature, sampling.top_k, sampling.seed, sampling.n) == (0.5, 3, -1, 1)
        assert (list(sampling.stop_token_ids), dict(sampling.logit_bias)) == ([5], {4: 1.5})
        assert (submitted.request_id, submitted.priority, submitted.cache_salt) == ("mine", 4, "tenant")
        assert 4000 < submitted.timeout_ms <= 5000
        assert stream.id == "mine"
        await answer(generation, pb.GenerateRequest(prompts=[pb.Prompt(text="Hello")]))
        assert fake.requests[1].sampling.max_tokens == 16


SHORT = ModelCard(max_model_len=32)


@pytest.mark.parametrize(
    ("request_", "kind", "field"),
    [
        (pb.GenerateRequest(), errors.InvalidRequest, "prompts"),
        (ask(temperature=-1), errors.InvalidRequest, "sampling.temperature"),
        (ask(max_tokens=0), errors.InvalidRequest, "sampling.max_tokens"),
        (ask(max_tokens=32), errors.InvalidRequest, "sampling.max_tokens"),
        (ask(""), errors.InvalidRequest, "prompts[0].text"),
        (ask("a" * 5000), errors.InvalidRequest, "prompts[0].text"),
        (ask("日" * 40), errors.InvalidRequest, "prompts[0].text"),
        (ask(allowed_token_ids=[EOS], min_tokens=1), errors.InvalidRequest, "sampling.allowed_token_ids"),
        (ask(bad_words=["x"]), errors.Unsupported, "sampling.bad_words"),
        (pb.GenerateRequest(model="other", prompts=[pb.Prompt(text="x")]), errors.NotFound, "model"),
    ],
)
async def test_bad_requests_name_the_field(
    byte_level_files: dict[str, bytes], serve: Serve, request_: pb.GenerateRequest, kind: type, field: str
) -> None:
    async with FakeBackend(byte_level_files, card=SHORT) as fake, serve(fake) as generation:
        with pytest.raises(kind) as caught:
            await generation.generate(request_, stream=False)
        assert caught.value.field == field
        assert not fake.requests


async def test_a_prompt_may_fill_the_model_but_for_one_token(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, card=SHORT) as fake, serve(fake) as generation:
        request = pb.GenerateRequest(prompts=[pb.Prompt()])
        request.prompts[0].token_ids.ids.extend([70] * 31)
        assert len((await answer(generation, request))[0].token_ids) == 1
        request.prompts[0].token_ids.ids.append(70)
        with pytest.raises(errors.InvalidRequest):
            await generation.generate(request, stream=False)


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"tools": [pb.Tool(name="f")]}, errors.Unsupported, "tools"),
        ({"chat_template": "{{ 1 }}"}, errors.InvalidRequest, "chat_template"),
        ({"messages": [pb.Message(role="wizard")]}, errors.InvalidRequest, "messages[0].role"),
        ({"messages": [pb.Message(role="user", content="日" * 40)]}, errors.InvalidRequest, "messages"),
    ],
)
async def test_bad_conversations_name_the_field(
    byte_level_files: dict[str, bytes], serve: Serve, fields: dict[str, Any], kind: type, field: str
) -> None:
    async with FakeBackend(byte_level_files, card=SHORT) as fake, serve(fake) as generation:
        request = pb.ChatRequest(**({"messages": [pb.Message(role="user", content="Hello")]} | fields))
        with pytest.raises(kind) as caught:
            await generation.chat(request, stream=False)
        assert caught.value.field == field


async def test_tools_are_rendered_when_none_may_be_called(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    none = pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE)
    hello = [pb.Message(role="user", content="Hello")]
    async with FakeBackend(byte_level_files, saying("Hi")) as fake, serve(fake) as generation:
        request = pb.ChatRequest(messages=hello, tools=[pb.Tool(name="f")], tool_choice=none)
        assert (await collect(await generation.chat(request, stream=False)))[0].text == "Hi"


async def test_a_template_in_a_request_where_it_is_trusted(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake, trust_request_chat_template=True) as generation:
        request = pb.ChatRequest(
            messages=[pb.Message(role="user", content="Hello")], chat_template="{{ messages[0].content }}!"
        )
        tokenized = await generation.tokenize(pb.TokenizeRequest(chat=request))
        assert list(tokenized.token_ids) == ids("Hello!")
        request.chat_template = "{% if %}"
        with pytest.raises(errors.InvalidRequest) as caught:
            await generation.chat(request, stream=False)
        assert caught.value.field == "chat_template"


async def test_the_operators_template_replaces_the_models(
    byte_level_files: dict[str, bytes], serve: Serve, tmp_path: Any
) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}?")
    async with FakeBackend(byte_level_files) as fake, serve(fake, chat_template=tmp_path / "own.jinja") as generation:
        chat = pb.ChatRequest(messages=[pb.Message(role="user", content="Hello")])
        assert list((await generation.tokenize(pb.TokenizeRequest(chat=chat))).token_ids) == ids("Hello?")


async def test_a_model_without_a_template_says_so(serve: Serve) -> None:
    async with FakeBackend(tokenizer_files(RAW)) as fake, serve(fake) as generation:
        with pytest.raises(errors.InvalidRequest, match="--chat-template") as caught:
            await generation.chat(pb.ChatRequest(messages=[pb.Message(role="user", content="x")]), stream=False)
        assert caught.value.reason == "NO_CHAT_TEMPLATE"


async def test_a_full_queue_refuses_before_tokenizing(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    card = ModelCard(limits=Limits(max_queued_tokens=100))
    async with FakeBackend(byte_level_files, card=card) as fake, serve(fake) as generation:
        fake.load.queued_uncached_tokens = 90
        fake.send_load(fake.load)
        await until(lambda: (load := generation.backends()[0].load) and load.queued_uncached_tokens == 90)
        assert (await answer(generation, ask("short", max_tokens=1)))[0].token_ids
        with pytest.raises(errors.Overloaded) as caught:
            await generation.generate(ask("long " * 40), stream=False)
        assert caught.value.retry_after_ms


async def test_a_deadline_that_is_over_is_never_admitted(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        with pytest.raises(errors.DeadlineExceeded):
            await generation.generate(ask(), stream=False, time_left=0)
        assert not fake.requests


async def test_one_failure_ends_one_request(byte_level_files: dict[str, bytes], serve: Serve) -> None:
    async with FakeBackend(byte_level_files, interval=0.01) as fake, serve(fake) as generation:
        unharmed = asyncio.create_task(answer(generation, ask(max_tokens=30)))
        await until(lambda: fake.num_steps > 2)
        fake.failure = engine.RequestFailure(code=13, reason="NAN_LOGITS", message="the logits were not finite")
        with pytest.raises(errors.Internal, match="not finite") as caught:
            await answer(generation, ask(), stream=True)
        assert caught.value.reason == "NAN_LOGITS"
        assert len((await unharmed)[0].token_ids) == 30
