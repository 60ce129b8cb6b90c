"""The command line, as a user runs it."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from ports import free_port

from weft.cli import main
from weft.cli.options import ModelFolder
from weft.client import Client
from weft.inference.v1 import inference_pb2 as pb
from weft.services import MODULES

COMMANDS = ["serve", "chat", "complete", "run-batch", "bench", "bench engine", "bench serve", "bench frontend", "demo"]


def run(*arguments: str, text: str | None = None) -> Any:
    return CliRunner().invoke(main, arguments, input=text, catch_exceptions=False)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_short_and_complete(command: str) -> None:
    result = run(*command.split(), "--help")
    assert result.exit_code == 0, result.output
    assert 3 <= len(result.output.splitlines()) <= 45


def test_help_imports_no_client() -> None:
    code = "from weft.cli import main; import sys; main(['-h'], standalone_mode=False); print('grpc' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.endswith("False\n")


def test_a_reader_that_has_read_enough_is_no_error() -> None:
    command = f"{sys.executable} -c 'from weft.cli import main; main()' serve --help | true"
    result = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, text=True, check=True)
    assert result.stderr == ""


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("service", ["backend", "frontend"])
def test_services_take_their_own_arguments(service: str, flag: str) -> None:
    command = [sys.executable, "-c", "from weft.cli import main; main()", service, flag]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--drain-timeout" in result.stdout


def test_chat_answers_once(target: str, service: Any) -> None:
    result = run("chat", "--target", target, "-m", "hello", "--system", "Be brief.", "--temperature", "0")
    assert result.output == "hello\n"
    request = service.requests[-1].request
    assert [(message.role, message.content) for message in request.messages] == [
        ("system", "Be brief."),
        ("user", "hello"),
    ]
    assert request.sampling.HasField("temperature")
    assert not request.sampling.HasField("top_p")


def test_chat_remembers(target: str, service: Any) -> None:
    result = run("chat", "--target", target, text="one\ntwo\n\n")
    assert result.exit_code == 0
    assert [message.content for message in service.requests[-1].request.messages] == ["one", "one", "two"]


def test_an_interrupt_ends_an_answer_and_not_the_chat(
    target: str, service: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_chat = Client.stream_chat

    def interrupted(client: Client, messages: Any, *arguments: Any, **options: Any) -> Iterator[pb.StreamChatResponse]:
        answer = stream_chat(client, messages, *arguments, **options)
        yield next(answer)
        if messages[-1]["content"] == "one":
            raise KeyboardInterrupt
        yield from answer

    monkeypatch.setattr(Client, "stream_chat", interrupted)
    result = run("chat", "--target", target, text="one\ntwo\n\n")
    assert result.exit_code == 0
    assert "two\n" in result.output
    assert [message.content for message in service.requests[-1].request.messages] == ["one", "o", "two"]
    assert run("chat", "--target", target, "-m", "one").exit_code == 1


@pytest.mark.parametrize(
    "command", [["complete", "a"], ["chat"], ["bench", "serve"], ["run-batch", "-i", "-", "-o", os.devnull]]
)
def test_an_empty_key_is_refused_by_name(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    results = [run(*command, "--api-key", "")]
    monkeypatch.setenv("WEFT_API_KEY", "")
    results.append(run(*command))
    for result in results:
        assert result.exit_code == 2
        assert "'--api-key' (env var: 'WEFT_API_KEY'): must not be empty" in result.output


def test_complete(target: str) -> None:
    assert run("complete", "--target", target, "--max-tokens", "5", "abc").output == "abcab\n"
    assert run("complete", "--target", target, "--max-tokens", "2", "-", text="xy").output == "xy\n"


@pytest.mark.parametrize("command", [["complete", "abc"], ["chat", "-m", "abc"], ["bench", "serve"]])
def test_where_nothing_answers_one_line_says_so(tmp_path: Any, command: list[str]) -> None:
    target = f"unix:{tmp_path}/nobody.sock"
    result = run(*command, "--target", target)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing answers at {target} over gRPC (target): is `weft serve` running there?\n"


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_bench_serve_says_where_nothing_answers_over_http(ending: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = run("bench", "serve", "--url", url + ending)
    assert result.exit_code == 1
    assert result.output == f"Error: nothing answers at {url} (--url): is `weft serve` running there?\n"


@pytest.mark.parametrize(
    "command", [["bench", "serve", "--url"], ["run-batch", "-i", "-", "-o", os.devnull, "--base-url"]]
)
def test_a_bad_certificate_is_not_taken_for_nobody(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(connection: http.client.HTTPSConnection) -> None:
        raise ssl.SSLCertVerificationError("self-signed certificate")

    monkeypatch.setattr("http.client.HTTPSConnection.connect", connect)
    result = run(*command, "https://127.0.0.1")
    assert result.exit_code == 1
    assert "self-signed certificate" in result.output
    assert "nothing answers" not in result.output


def test_serve_needs_something_to_serve_on() -> None:
    result = run("serve", "--port", "0", "--grpc-port", "0")
    assert result.exit_code == 2


def test_bench_serve_over_grpc(target: str, service: Any, tmp_path: Any) -> None:
    file = tmp_path / "out.json"
    result = run(
        "bench",
        "serve",
        "--target",
        target,
        "--streams",
        "2",
        "--requests",
        "4",
        "--max-tokens",
        "8",
        "--prompt-len",
        "20",
        "--seed",
        "0",
        "--json",
        str(file),
    )
    assert result.exit_code == 0, result.output
    assert "2 streams: 100%" in result.stderr
    assert "4/4" in result.stderr
    (results,) = json.loads(file.read_text())
    assert (results["requests"], results["seed"]) == (4, 0)
    streamed = [request for request in service.requests if isinstance(request, pb.StreamGenerateRequest)]
    prompts = [request.request.prompts[0].text for request in streamed]
    assert len(prompts) == 2 + 4, "two warm up"
    assert len(set(prompts)) > 1
    assert all(17 <= len(prompt) <= 23 for prompt in prompts), "a byte is a token there"
    assert results["out_tok_s"] > 0
    assert 0 < results["ttft_ms_p50"] <= results["ttft_ms_p99"] == results["ttft_ms_max"]
    assert results["failed_percent"] == 0


def test_bench_serve_sends_new_prompts_unless_given_a_seed(target: str, service: Any) -> None:
    runs = []
    for seed in ([], ["--seed", "5"], ["--seed", "5"]):
        sizes = ["--streams", "2,2", "--requests", "4", "--max-tokens", "2", "--prompt-len", "80"]
        assert run("bench", "serve", "--target", target, *sizes, *seed).exit_code == 0
        streamed = [request for request in service.requests if isinstance(request, pb.StreamGenerateRequest)]
        service.requests.clear()
        runs.append({request.request.prompts[0].text for request in streamed})
        assert len(runs[-1]) == len(streamed) == 2 * (2 + 4), "no prompt comes twice"
    assert runs[0].isdisjoint(runs[1])
    assert runs[1] == runs[2]


def test_bench_serve_counts_what_failed(target: str, service: Any, tmp_path: Any) -> None:
    file = tmp_path / "out.json"

    def fail(request: Any, context: Any) -> None:
        """The third stream is refused, which is the second measured one."""
        service.requests.append(request)
        if sum(isinstance(request, pb.StreamGenerateRequest) for request in service.requests) == 3:
            context.abort(grpc.StatusCode.INTERNAL, "no")

    service._note = fail
    sizes = ["--streams", "1", "--max-tokens", "8", "--prompt-len", "20"]
    result = run("bench", "serve", "--target", target, *sizes, "--json", str(file))
    assert result.exit_code == 1
    assert "25.00 % of the requests failed" in result.output
    assert "4/4" in result.stderr
    assert json.loads(file.read_text())[0]["failed_percent"] == 25


@pytest.mark.parametrize("end", [b"", b'data: {"error":{"message":"lost"}}\n\n'])
async def test_bench_serve_takes_no_broken_stream_for_a_whole_one(end: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        events = b'data: {"choices":[{"text":"a"}],"usage":null}\n\n' + end
        writer.write(head + (b'{"count":512}' if request.startswith(b"POST /tokenize ") else events))
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        command = [sys.executable, "-c", "from weft.cli import main; main()", "bench", "serve", "--url", url]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
        _, errors = await process.communicate()
    assert process.returncode == 1
    assert b"the stream broke off" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "serve", "--streams", "0"],
        ["bench", "serve", "--requests", "0"],
        ["bench", "serve", "--parent", "0"],
        ["bench", "serve", "--seed", "-1"],
        ["bench", "frontend", "--streams", "0"],
        ["bench", "frontend", "--seconds", "0"],
        ["bench", "frontend", "--interval", "0"],
        ["bench", "frontend", "--tokenizer", "."],
        ["bench", "engine", ".", "--top-k", "-1"],
        ["bench", "engine", ".", "--top-p", "0"],
        ["bench", "engine", ".", "--temperature", "-1"],
        ["bench", "engine", ".", "--batches", "8,x"],
        ["bench", "engine", ".", "--batches", "0"],
        ["bench", "engine", ".", "--parts", "decode,x"],
        ["run-batch", "-i", "-", "-o", "x", "--concurrency", "0"],
        ["run-batch", "-i", "-", "-o", "x", "--base-url", "localhost:8000"],
        ["run-batch", "-i", "-", "-o", "x", "--base-url", "http://localhost:port"],
        ["run-batch", "-i", "-", "-o", "x", "--base-url", "https://:8000"],
        ["bench", "serve", "--url", "localhost:8000"],
        ["bench", "serve", "--url", "http://localhost:80000"],
        ["serve", "--port", "99999"],
        ["serve", "--grpc-port", "-1"],
        ["frontend", "--backend", "x", "--port", "99999"],
    ],
)
def test_options_are_checked_before_anything_starts(arguments: list[str]) -> None:
    command = [sys.executable, "-c", "from weft.cli import main; main()", *arguments]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=20)
    assert result.returncode == 2, result.stderr
    assert arguments[-2] in result.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "error"),
    [
        ("serve --no-such-flag", 2, "Error: No such option '--no-such-flag'."),
        ("serve -tp 2", 2, "Error: -tp is called --tensor-parallel-size"),
        ("serve --block-size", 2, "Error: Option '--block-size' requires an argument."),
        ("demo --block-size", 2, "Error: Option '--block-size' requires an argument."),
        ("bench engine . --block-size", 2, "Error: Option '--block-size' requires an argument."),
        ("serve --block-size 3", 1, "weft: --block-size 3: must be a power of two"),
        ("serve --listen unix:x", 1, "Error: --listen: is for `weft backend`"),
        ("serve --device cpu", 1, "weft frontend: cannot listen on 127.0.0.1:PORT: Address already in use (--port)"),
    ],
)
def test_a_start_that_fails_says_why_once(arguments: str, exit_code: int, error: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-c", "from weft.cli import main; main()", *arguments.split()]
    with socket.socket() as taken:  # a fault of the frontend, which comes after those of the backend
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        if "serve" in command:
            command[4:4] = ["--host", "127.0.0.1", "--port", port]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        result = subprocess.run(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, timeout=60)
    assert result.returncode == exit_code
    assert result.stderr.splitlines()[-1].startswith(error.replace("PORT", port))
    assert result.stderr.count(error.partition(":")[2].replace("PORT", port)) == 1
    assert "Usage: weft backend" not in result.stderr, "that is not what was typed"
    assert "Address" in error or "Address" not in result.stderr
    assert not list(tmp_path.glob("weft-*"))


@pytest.mark.parametrize(
    "command", ["serve", "backend", "frontend", "demo", "bench engine weft-tiny", "bench frontend"]
)
def test_a_missing_module_is_one_line(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.services.MODULES", dict.fromkeys(MODULES, ("weft_no_such",)))
    result = run(*command.split())
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: weft_no_such is not installed: pip install 'weft\[\w+\]'\n", result.output)


def test_bench_engine_knows_the_builtin_model_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = ModelFolder()
    assert (folder.convert("weft-tiny", None, None) / "config.json").is_file()
    (tmp_path / "weft-tiny").mkdir()
    assert folder.convert("weft-tiny", None, None) == Path("weft-tiny"), "a folder of that name wins"


def test_a_file_that_cannot_be_written_is_one_line(target: str, tmp_path: Any) -> None:
    sizes = ["--streams", "1", "--requests", "1", "--max-tokens", "2"]
    result = run("bench", "serve", "--target", target, *sizes, "--json", str(tmp_path / "none/x.json"))
    assert result.exit_code == 1
    assert "Error: [Errno 2] No such file or directory" in result.output


@pytest.mark.parametrize(
    "arguments", [("--max-tokens", "-1"), ("--max-tokens", "99999999999"), ("--seed", str(1 << 63)), ("--top-k", "3e9")]
)
def test_numbers_out_of_range_are_refused_by_name(arguments: tuple[str, str]) -> None:
    result = CliRunner().invoke(main, ["complete", "Hi", *arguments])
    assert result.exit_code == 2
    assert f"Invalid value for '{arguments[0]}'" in result.output
