"""LLM, ``weft serve``, ``run-batch`` and ``bench engine`` with the real services on a tiny random model."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner
from ports import free_port

from weft import LLM, Client, SamplingParams
from weft.cli import main
from weft.cli.bench_engine import started_session
from weft.cli.engine_load import EngineLoad, Sizes
from weft.engine.v1.engine_pb2 import GetLoadRequest, GetLoadResponse
from weft.errors import InvalidRequest, StartError

GREEDY = SamplingParams(temperature=0, max_tokens=8)
ENGINE: dict[str, Any] = {"device": "cpu", "max_num_seqs": 8, "num_pages": 256}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny-llama"
    make_checkpoint("llama", path)
    return path


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    with LLM(str(checkpoint), **ENGINE) as llm:
        yield llm
        assert_all_pages_free(llm)


def assert_all_pages_free(llm: LLM) -> None:
    stack = llm._connection._stack
    assert stack is not None
    with grpc.insecure_channel(f"unix:{stack._folder}/backend.sock") as channel:
        method = channel.unary_unary(
            "/weft.engine.v1.EngineService/GetLoad",
            request_serializer=GetLoadRequest.SerializeToString,
            response_deserializer=GetLoadResponse.FromString,
        )
        load = method(GetLoadRequest()).load
    assert (load.num_running, load.num_waiting) == (0, 0)
    assert load.free_pages == load.total_pages


def test_text_and_token_ids_are_the_same_prompt(llm: LLM) -> None:
    (by_text,) = llm.generate("The capital of France is", GREEDY, use_tqdm=False)
    (by_ids,) = llm.generate([by_text.prompt_token_ids], GREEDY, use_tqdm=False)
    assert by_text.prompt == "The capital of France is"
    assert len(by_text.prompt_token_ids) > 3
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.outputs[0].text == by_ids.outputs[0].text
    assert by_text.finished


def test_prompts_together_are_as_alone(llm: LLM) -> None:
    prompts = ["Hello, my name is", "One and one is", "Weft", "你好 🙂"]
    params = [SamplingParams(temperature=0, max_tokens=4 + i) for i in range(4)]
    together = llm.generate(prompts, params, use_tqdm=False)
    for prompt, param, output in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate(prompt, param, use_tqdm=False)
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids
        assert output.outputs[0].finish_reason == "stop" or len(output.outputs[0].token_ids) == param.max_tokens


def test_choices_and_logprobs(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = llm.generate("Hello", params, use_tqdm=False)
    assert [choice.index for choice in output.outputs] == [0, 1, 2]
    for choice in output.outputs:
        assert choice.logprobs is not None
        assert [token in entry for token, entry in zip(choice.token_ids, choice.logprobs, strict=True)] == [True] * 5
        assert choice.cumulative_logprob == pytest.approx(
            sum(entry[token].logprob for token, entry in zip(choice.token_ids, choice.logprobs, strict=True))
        )
    assert output.prompt_logprobs is not None
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    (again,) = llm.generate("Hello", params, use_tqdm=False)
    assert [choice.token_ids for choice in again.outputs] == [choice.token_ids for choice in output.outputs]


def test_chat(llm: LLM) -> None:
    conversation = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(conversation, GREEDY, use_tqdm=False)
    assert output.prompt is None
    assert len(output.prompt_token_ids) > 5
    assert output.outputs[0].token_ids


def test_a_bad_request_leaves_the_rest_alone(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"sampling\.top_p"):
        llm.generate("Hello", SamplingParams(top_p=1.5), use_tqdm=False)
    assert llm.generate("Hello", GREEDY, use_tqdm=False)[0].finished


def test_letting_go_ends_the_services(checkpoint: Path) -> None:
    llm = LLM(str(checkpoint), **ENGINE)
    stack = llm._connection._stack
    assert stack is not None
    pids = [service.pid for service in stack.services]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    del llm, stack
    gc.collect()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("no/such/folder", {}, "no/such/folder"),
        (None, {"max_num_batched_tokens": 1}, "max_num_batched_tokens 1 is below max_num_seqs"),
        (None, {"max_seqs": 1}, "^No such option 'max_seqs'. Did you mean 'max_num_seqs'.$"),
        (None, {"trust_remote_code": True}, "^trust_remote_code is not needed"),
    ],
)
def test_the_cause_of_a_failed_start_is_raised(checkpoint: Path, model: str | None, options: Any, message: str) -> None:
    with pytest.raises(StartError, match=message):
        LLM(model or str(checkpoint), **options)


def test_a_model_without_a_tokenizer_is_no_service_of_text(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "tiny", tokenizer=False)
    with pytest.raises(StartError, match="tiny has no tokenizer"):
        LLM(str(tmp_path / "tiny"), **ENGINE)


@pytest.fixture
def served(checkpoint: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
    """A running ``weft serve`` that has said it is ready, its HTTP port and its gRPC port."""
    port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-c", "from weft.cli import main; main()", "serve", str(checkpoint), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--grpc-port", str(grpc_port), "--num-pages", "256"]
    command += ["--workers", "2", "--drain-timeout", "5"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith("weft frontend: ready in "):
            break
    else:
        pytest.fail("".join(lines))
    threading.Thread(target=process.stderr.read, daemon=True).start()
    yield process, port, grpc_port
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_serve_answers_and_drains(
    served: tuple[subprocess.Popen[str], int, int], number: signal.Signals, tmp_path: Path
) -> None:
    process, http_port, port = served
    for address in (["--url", f"http://127.0.0.1:{http_port}"], ["--target", f"127.0.0.1:{port}"]):
        sizes = ["--streams", "2", "--prompt-len", "20", "--max-tokens", "8", "--parent", str(process.pid)]
        result = CliRunner().invoke(main, ["bench", "serve", *address, *sizes], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "out_tok_s" in result.output
        assert "engine cpu_percent" in result.output
    with Client(f"127.0.0.1:{port}") as client:
        assert client.generate("Hello", GREEDY).choices[0].token_ids
        stream = client.stream_generate("Hello", SamplingParams(max_tokens=100, ignore_eos=True))
        first = next(stream)
        process.send_signal(number)
        num_tokens = sum(len(part.choices[0].token_ids) for part in [first, *stream] if part.choices)
        assert num_tokens == 100, "a running request ends before the service does"
    assert process.wait(20) == 0
    assert not list(tmp_path.glob("weft-*"))


def backend_of(process: subprocess.Popen[str]) -> int:
    """Process id of the backend that ``weft serve`` started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(child) for child in children if b"weft_backend" in Path(f"/proc/{child}/cmdline").read_bytes())


def test_a_second_signal_ends_serve_at_once(served: tuple[subprocess.Popen[str], int, int], tmp_path: Path) -> None:
    process, _, port = served
    with Client(f"127.0.0.1:{port}", max_retries=0) as client:
        stream = client.stream_generate("Hello", SamplingParams(max_tokens=200, ignore_eos=True))
        next(stream)
        os.kill(backend_of(process), signal.SIGSTOP)  # the stream would go on until the drain timeout, 5 s
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(20)
        assert time.monotonic() - begin < 2
        stream.close()
    assert not list(tmp_path.glob("weft-*"))


def test_serve_dies_when_its_backend_does(served: tuple[subprocess.Popen[str], int, int]) -> None:
    process, *_ = served
    os.kill(backend_of(process), signal.SIGKILL)
    assert process.wait(20) == 1


def test_run_batch_on_a_private_service(checkpoint: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
    messages = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    lines = [("/v1/completions", body), ("/v1/chat/completions", messages), ("/v1/completions", {**body, "top_p": 3})]
    source.write_text(
        "".join(
            json.dumps({"custom_id": str(i), "method": "POST", "url": url, "body": body}) + "\n"
            for i, (url, body) in enumerate(lines)
        )
    )
    arguments = ["run-batch", "-i", str(source), "-o", str(output), str(checkpoint), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--num-pages", "256"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    results = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    assert [result["status_code"] for result in results] == [200, 200, 400]
    assert results[0]["body"]["usage"]["completion_tokens"] == 4


def test_bench_engine_measures_every_key(checkpoint: Path) -> None:
    arguments = [str(checkpoint), "--load-format", "dummy", "--device", "cpu", "--num-pages", "512"]
    sizes = Sizes(prompt_len=20, decode_len=4, mixed_lens=(5, 20))
    begin = time.perf_counter()
    with started_session([*arguments, "--no-enable-prefix-caching"]) as session:
        results = dict(EngineLoad(session, ["decode", "mixed256"], sizes=sizes).measure([1, 3]))
    assert set(results) == {
        *("decode_ms_b1_ctx1k", "prefill_ms_b1_1k", "decode_ms_b3_ctx1k", "prefill_ms_b3_1k"),
        "mixed256_out_tok_s",
    }
    assert all(value > 0 for name, value in results.items() if "decode" not in name)
    assert time.perf_counter() - begin < 60


@pytest.mark.parametrize("command", [["demo"], ["bench", "engine"], ["run-batch", "-i", "in.jsonl", "-o", "out.jsonl"]])
def test_sigterm_leaves_nothing_behind(checkpoint: Path, tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "in.jsonl").write_text("{}\n")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    arguments = [
        sys.executable,
        "-c",
        "from weft.cli import main; main()",
        *command,
        str(checkpoint),
        "--device",
        "cpu",
    ]
    environment = os.environ | {"TMPDIR": str(temporary)}
    process = subprocess.Popen(arguments, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "weft: " in process.stderr.readline(), "the backend has begun to start"
    assert list(temporary.glob("weft-*"))
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert not list(temporary.glob("weft-*"))
