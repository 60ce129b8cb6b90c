"""Two frontends and two backends: both models everywhere, and a lost backend takes only its own requests along."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import openai
import pytest
from deployment import Backend, Frontend, deployment, wait_until

from weft import Client, SamplingParams
from weft.errors import WeftError


def test_both_frontends_serve_both_models(frontends: list[Frontend]) -> None:
    texts = set()
    for frontend in frontends:
        with Client(frontend.target) as client:
            for model in ("weft-tiny", "small"):
                params = SamplingParams(temperature=0, max_tokens=8)
                texts.add((model, client.generate("The capital of France is", params, model=model).choices[0].text))
    assert len(texts) == 2


def stream_forever(frontend: Frontend, model: str, outcome: list[object], started: threading.Event) -> None:
    client = openai.OpenAI(base_url=f"{frontend.url}/v1", api_key="none", max_retries=0)
    try:
        stream = client.completions.create(
            model=model, prompt="Hello", max_tokens=200, stream=True, temperature=0, extra_body={"ignore_eos": True}
        )
        num_chunks = 0
        for chunk in stream:
            num_chunks += bool(chunk.choices and chunk.choices[0].text)
            started.set()
        outcome.append(num_chunks)
    except openai.APIError as error:
        outcome.append(error)
    outcome.append(time.monotonic())


@pytest.fixture
def doomed(small_model: str) -> Iterator[tuple[list[Backend], list[Frontend]]]:
    with deployment([None, small_model], num_frontends=2) as running:
        yield running


@pytest.mark.slow
def test_killing_a_backend_fails_only_its_requests(doomed: tuple[list[Backend], list[Frontend]]) -> None:
    (tiny, small), frontends = doomed
    outcomes: dict[tuple[int, str], list[object]] = {}
    threads = []
    for index, frontend in enumerate(frontends):
        for model in ("weft-tiny", "small"):
            outcome, started = outcomes.setdefault((index, model), []), threading.Event()
            threads.append(threading.Thread(target=stream_forever, args=(frontend, model, outcome, started)))
            threads[-1].start()
            assert started.wait(20)
    # Both models' streams run on: the small one's is restarted until the kill if it was quick.
    small.kill()
    killed = time.monotonic()
    for thread in threads:
        thread.join(60)
    for (_, model), (result, ended) in outcomes.items():
        if model == "weft-tiny":
            assert isinstance(result, int)
            assert result > 50
        else:
            assert isinstance(result, openai.APIError), "a broken stream looked like a finished one"
            assert ended - killed < 1.0
    tiny.assert_idle()
    for frontend in frontends:
        wait_until(lambda frontend=frontend: frontend.num_models() == 1, 5, "the lost model is no longer listed")
        with Client(frontend.target) as client:
            client.generate("Hello", SamplingParams(max_tokens=3), model="weft-tiny")
            started_at = time.monotonic()
            with pytest.raises(WeftError):
                client.generate("Hello", SamplingParams(max_tokens=3), model="small", timeout=1.0)
            assert time.monotonic() - started_at < 1.5


def test_a_lost_frontend_frees_its_pages(small_model: str) -> None:
    with Backend(None) as backend, Frontend(backend) as frontend:
        outcome: list[object] = []
        started = threading.Event()
        thread = threading.Thread(target=stream_forever, args=(frontend, "weft-tiny", outcome, started))
        thread.start()
        assert started.wait(20)
        frontend.kill()
        thread.join(10)
        wait_until(lambda: backend.load().num_running == 0, 1.0, "its requests are freed")
        backend.assert_idle()
