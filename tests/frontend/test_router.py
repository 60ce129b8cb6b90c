"""Which backend, and which model: names, aliases, load, loss."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from weft.engine.v1.model_pb2 import LoadReport, ModelCard
from weft.inference.v1 import inference_pb2 as pb
from weft.inference.v1.sampling_pb2 import SamplingParams
from weft.testing import FakeBackend
from weft_frontend import errors
from weft_frontend.config import FrontendConfig, parse_served_model_names
from weft_frontend.generation import Generation

Serve = Callable[..., Any]
Files = dict[str, bytes]


def named(name: str, **fields: Any) -> ModelCard:
    return ModelCard(name=name, **fields)


def ask(model: str = "", max_tokens: int = 1) -> pb.GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens)
    return pb.GenerateRequest(model=model, prompts=[pb.Prompt(text="Hello")], sampling=sampling)


async def run(generation: Generation, model: str = "") -> str:
    """Complete once; the name of the model that answered."""
    stream = await generation.generate(ask(model), stream=False)
    assert await stream.next()
    return stream.model


def names(generation: Generation) -> list[str]:
    return [model.id for model in generation.list_models().models]


async def test_two_models_by_name(byte_level_files: Files, byte_fallback_files: Files, serve: Serve) -> None:
    async with (
        FakeBackend(byte_level_files, card=named("zebra")) as zebra,
        FakeBackend(byte_fallback_files, card=named("ape")) as ape,
        serve(zebra, ape) as generation,
    ):
        assert names(generation) == ["ape", "zebra"]
        assert await run(generation, "zebra") == "zebra"
        assert await run(generation, "ape") == "ape"
        assert (len(zebra.requests), len(ape.requests)) == (1, 1)
        with pytest.raises(errors.InvalidRequest) as caught:
            await run(generation)
        assert caught.value.field == "model"
        with pytest.raises(errors.NotFound):
            await run(generation, "lion")
        assert [(status.model, status.ready) for status in generation.backends()] == [("zebra", True), ("ape", True)]


async def test_aliases_are_the_only_names(byte_level_files: Files, serve: Serve) -> None:
    served = parse_served_model_names(("small=fake", "tiny=fake", "other"))
    async with FakeBackend(byte_level_files) as fake, serve(fake, served_model_names=served) as generation:
        assert names(generation) == ["small", "tiny"]
        assert await run(generation, "tiny") == "tiny"
        with pytest.raises(errors.NotFound):
            await run(generation, "fake")


async def test_a_name_that_no_backend_has_is_told(
    byte_level_files: Files, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    served = parse_served_model_names(("small=fake", "nope", "b=nada"))
    async with FakeBackend(byte_level_files) as fake, serve(fake, served_model_names=served) as generation:
        await until(lambda: len(caplog.records) == 2)
        assert [record.getMessage() for record in caplog.records] == [
            "--served-model-name nada: no backend has a model of this name; they have fake",
            "--served-model-name nope: no backend has a model of this name; they have fake",
        ]
        with pytest.raises(errors.NotFound, match=r'there is no model "nope" here; served: small$'):
            await run(generation, "nope")


async def test_a_frontend_of_names_that_no_backend_has_says_so(byte_level_files: Files) -> None:
    async with FakeBackend(byte_level_files) as fake:
        config = FrontendConfig(backends=(fake.target,), served_model_names={"small": "nope"})
        async with Generation(config) as generation:
            await until(lambda: generation.backends()[0].ready)
            assert not generation.ready
            assert generation.why_not_ready == "no backend has nope, which --served-model-name asks for"
            with pytest.raises(errors.Unavailable, match="no backend has nope"):
                await run(generation, "small")


async def test_an_unknown_name_is_told_with_the_first_of_those_that_are_served(
    byte_level_files: Files, serve: Serve
) -> None:
    served = parse_served_model_names(tuple(f"{letter}=fake" for letter in "jihgfedcba"))
    async with FakeBackend(byte_level_files) as fake, serve(fake, served_model_names=served) as generation:
        with pytest.raises(errors.NotFound, match=r'no model "k" here; served: a, b, c, d, e, f, g, h, …$'):
            await run(generation, "k")
        with pytest.raises(errors.InvalidRequest, match=r"several models are served: a, b, .*, h, …$"):
            await run(generation)
        for name in ("<b>", "k" * 101):
            with pytest.raises(errors.NotFound, match="no such model here; served: a, "):
                await run(generation, name)


async def test_a_model_whose_backends_are_away_is_not_told_as_served(byte_level_files: Files, serve: Serve) -> None:
    async with FakeBackend(byte_level_files) as fake, serve(fake) as generation:
        assert (await generation.get_model("fake")).id == "fake"
        await fake.die()
        await until(lambda: not generation.ready)
        with pytest.raises(errors.Unavailable, match="no backend of fake is ready"):
            await generation.get_model("fake")
        with pytest.raises(errors.NotFound, match='no model "x" here; served: none'):
            await generation.get_model("x")


async def test_no_name_is_missing_while_a_backend_was_not_seen(
    byte_level_files: Files, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend(byte_level_files) as fake:
        config = FrontendConfig(backends=(fake.target, f"unix:{tmp_path}/none"), served_model_names={"big": "big"})
        async with Generation(config) as generation:
            await until(lambda: generation.backends()[0].ready)
            assert generation.why_not_ready == "no backend is ready"
            await asyncio.sleep(0.1)
            assert "--served-model-name" not in caplog.text


async def test_ready_does_not_wait_for_a_backend_that_has_failed(byte_level_files: Files, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/backend.sock"
    async with FakeBackend(byte_level_files) as fake, Generation(FrontendConfig(backends=(nowhere,))) as alone:
        waiting = asyncio.create_task(alone.wait_ready())
        async with Generation(FrontendConfig(backends=(fake.target, nowhere))) as generation, asyncio.timeout(5):
            await generation.wait_ready()
            assert [status.ready for status in generation.backends()] == [True, False]
        assert not waiting.done()  # one that is alone is waited for
        async with FakeBackend(byte_level_files, address=nowhere), asyncio.timeout(5):
            await waiting


async def test_the_least_loaded_backend_is_picked(byte_level_files: Files, serve: Serve) -> None:
    async with (
        FakeBackend(byte_level_files) as busy,
        FakeBackend(byte_level_files) as idle,
        serve(busy, idle) as generation,
    ):
        busy.send_load(LoadReport(queued_uncached_tokens=500))
        await until(lambda: (load := generation.backends()[0].load) and load.queued_uncached_tokens == 500)
        for _ in range(5):
            await run(generation)
        assert (len(busy.requests), len(idle.requests)) == (0, 5)
        idle.send_load(LoadReport(draining=True))
        await until(lambda: (load := generation.backends()[1].load) and load.draining)
        await run(generation)
        assert len(busy.requests) == 1


async def test_prompts_of_one_request_spread(byte_level_files: Files, serve: Serve) -> None:
    async with (
        FakeBackend(byte_level_files) as one,
        FakeBackend(byte_level_files) as two,
        serve(one, two) as generation,
    ):
        request = ask()
        request.prompts.extend([request.prompts[0]] * 7)
        stream = await generation.generate(request, stream=False)
        assert len(await stream.next() or []) == 8
        assert (len(one.requests), len(two.requests)) == (4, 4)


async def test_a_lost_backend_fails_only_its_requests(
    byte_level_files: Files, byte_fallback_files: Files, serve: Serve
) -> None:
    async with (
        FakeBackend(byte_level_files, card=named("lost")) as lost,
        FakeBackend(byte_fallback_files, card=named("kept")) as kept,
        serve(lost, kept) as generation,
    ):
        streams = [await generation.generate(ask(model, 400), stream=False) for model in ("lost", "kept")]
        await until(lambda: lost.num_running and kept.num_running)
        await lost.die()
        with pytest.raises(errors.Unavailable) as caught:
            await streams[0].next()
        assert caught.value.retry_after_ms
        with pytest.raises(errors.Unavailable):
            await run(generation, "lost")  # still a known name
        assert names(generation) == ["kept"]
        deltas = await streams[1].next()
        assert deltas is not None
        assert len(deltas[0].token_ids) == 400


async def test_a_backend_with_another_model_under_the_name_is_refused(
    byte_level_files: Files, byte_fallback_files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    async with FakeBackend(byte_level_files) as first, FakeBackend(byte_fallback_files) as other:
        config = FrontendConfig(backends=(first.target, other.target))
        async with Generation(config) as generation:
            await until(lambda: "hashes differ" in caplog.text)
            assert sum(status.ready for status in generation.backends()) == 1
            assert await run(generation) == "fake"


async def test_a_model_may_change_when_nobody_serves_the_old_one(
    byte_level_files: Files, byte_fallback_files: Files, serve: Serve
) -> None:
    async with FakeBackend(byte_level_files) as old, serve(old) as generation:
        await old.die()
        await until(lambda: not generation.ready)
        async with FakeBackend(byte_fallback_files, address=old.target) as new:
            await until(lambda: generation.ready)
            assert await run(generation) == "fake"
            assert new.requests[0].prompt_token_ids[0] == 1  # its own tokenizer's <s>


async def test_nothing_is_served_before_a_backend_is_seen(tmp_path: Any) -> None:
    async with Generation(FrontendConfig(backends=(f"unix:{tmp_path}/none",))) as generation:
        assert not generation.ready
        assert names(generation) == []
        with pytest.raises(errors.Unavailable) as caught:
            await generation.generate(ask(), stream=True)
        assert caught.value.retry_after_ms


async def test_a_process_that_just_started_waits_for_its_backend(byte_level_files: Files) -> None:
    async with FakeBackend(byte_level_files) as fake, Generation(FrontendConfig(backends=(fake.target,))) as generation:
        assert not generation.ready
        assert await run(generation) == "fake"


async def test_a_bad_tokenizer_keeps_the_backend_out(byte_level_files: Files, caplog: pytest.LogCaptureFixture) -> None:
    files = byte_level_files | {"tokenizer_config.json": b'{"chat_template": "{% if %}"}'}
    async with FakeBackend(files) as fake, Generation(FrontendConfig(backends=(fake.target,))) as generation:
        await until(lambda: "chat template has an error in line 1" in caplog.text)
        assert not generation.ready


async def test_reset_prefix_cache_reaches_every_backend(byte_level_files: Files, serve: Serve) -> None:
    async with (
        FakeBackend(byte_level_files) as one,
        FakeBackend(byte_level_files) as two,
        serve(one, two) as generation,
    ):
        assert await generation.reset_prefix_cache() == 6


@pytest.mark.parametrize("name", ["", "=x", "x="])
def test_bad_served_names(name: str) -> None:
    with pytest.raises(ValueError, match="ALIAS=NAME"):
        parse_served_model_names((name,))


def test_an_alias_of_two_models_is_refused() -> None:
    with pytest.raises(ValueError, match="--served-model-name gives 'a' twice"):
        parse_served_model_names(("a=x", "a=y"))
