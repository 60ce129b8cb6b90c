"""``weft run-batch`` against a small HTTP server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from click.testing import CliRunner
from ports import free_port

from weft.cli import main
from weft.cli.run_batch import BatchRunner, run_lines


class EchoServer(ThreadingHTTPServer):
    """Answers a completion with its prompt; statuses in ``failures`` are given first."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), EchoHandler)
        self.failures: list[int] = []
        self.keys: list[str | None] = []
        self.takes_key = True
        self.closes_idle = False  # connections end after an answer that does not say so
        self.answer: bytes | None = None  # instead of JSON

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class EchoHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: EchoServer

    def do_GET(self) -> None:
        self.send_response(200 if self.server.takes_key else 401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.append(self.headers["Authorization"])
        status = self.server.failures.pop(0) if self.server.failures else 200
        answer = self.server.answer or json.dumps({"choices": [{"text": body["prompt"]}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("x-request-id", "r1")
        self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(answer)
        self.close_connection = self.server.closes_idle

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[EchoServer]:
    with EchoServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def request(number: int, **changes: Any) -> dict[str, Any]:
    body = {"prompt": f"p{number}"}
    return {"custom_id": f"c{number}", "method": "POST", "url": "/v1/completions", "body": body, **changes}


def run(server: EchoServer, folder: Path, lines: list[str], *options: str) -> tuple[list[dict[str, Any]], str]:
    source, output = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    arguments = ["run-batch", "-i", str(source), "-o", str(output), "--base-url", server.url, *options]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    results = [json.loads(line) for line in output.read_text().splitlines()]
    succeeded = any(result["response"] and result["response"]["status_code"] == 200 for result in results)
    assert result.exit_code == (0 if succeeded else 1), result.output
    return results, result.output


def test_the_input_is_never_the_output(server: EchoServer, tmp_path: Path) -> None:
    file = tmp_path / "batch.jsonl"
    file.write_text(json.dumps(request(1)) + "\n")
    arguments = ["run-batch", "-i", str(file), "-o", str(file), "--base-url", server.url]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 2
    assert "emptied" in result.output
    assert file.read_text() == json.dumps(request(1)) + "\n"


def test_the_address_may_be_that_of_an_sdk(server: EchoServer, tmp_path: Path) -> None:
    results, _ = run(server, tmp_path, [json.dumps(request(1))], "--base-url", f"{server.url}/v1/")
    assert results[0]["response"]["body"]["choices"][0]["text"] == "p1"


def test_answers_are_in_the_order_of_the_requests(server: EchoServer, tmp_path: Path) -> None:
    lines = [json.dumps(request(i)) for i in range(50)]
    results, output = run(server, tmp_path, [*lines, "  "], "--concurrency", "3", "--api-key", "k")
    assert [result["custom_id"] for result in results] == [f"c{i}" for i in range(50)]
    assert [result["response"]["body"]["choices"][0]["text"] for result in results] == [f"p{i}" for i in range(50)]
    assert {result["response"]["status_code"] for result in results} == {200}
    assert {result["response"]["request_id"] for result in results} == {"r1"}
    assert len({result["id"] for result in results}) == 50
    assert set(server.keys) == {"Bearer k"}
    assert "50 requests, 0 failed" in output


def test_a_busy_service_is_asked_again_and_other_errors_are_kept(server: EchoServer, tmp_path: Path) -> None:
    server.failures = [429, 503, 200, 400]
    results, output = run(server, tmp_path, [json.dumps(request(i)) for i in range(2)], "--concurrency", "1")
    assert [result["response"]["status_code"] for result in results] == [200, 400]
    assert "2 requests, 1 failed" in output


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON: Expecting"),
        ('{"custom_id": "\udcff"}', "line 2: 'utf-8' codec can't encode"),
        ("[]", "must be a JSON object"),
        (json.dumps(request(1, custom_id=7)), "custom_id"),
        (json.dumps(request(1, method="GET")), "method"),
        (json.dumps(request(1, url="/metrics")), "url"),
        (json.dumps(request(1, body=None)), "body"),
        (json.dumps(request(1, body={"prompt": "a", "stream": True})), "stream"),
    ],
)
def test_a_bad_line_fails_alone(server: EchoServer, tmp_path: Path, line: str, message: str) -> None:
    results, output = run(server, tmp_path, ["", line, json.dumps(request(2))])
    assert results[0]["response"] is None
    assert results[0]["error"]["message"].startswith("line 2: ")
    assert results[0]["error"]["code"] == "invalid_line"
    assert message in results[0]["error"]["message"]
    assert results[1]["error"] is None
    assert "2 requests, 1 failed" in output


def test_an_id_that_is_no_text_comes_back(server: EchoServer, tmp_path: Path) -> None:
    results, _ = run(server, tmp_path, [json.dumps(request(1, custom_id="\ud800 日"))])
    assert results[0]["custom_id"] == "\ud800 日"


def test_a_service_that_is_gone(server: EchoServer) -> None:
    server.socket.close()
    assert BatchRunner(server.url, None).run(1, json.dumps(request(1)))["error"]["code"] == "connection_error"


def test_no_line_is_run_where_nothing_answers(tmp_path: Path) -> None:
    url, output = f"http://127.0.0.1:{free_port()}", tmp_path / "out.jsonl"
    output.write_text("the last answers")
    arguments = ["run-batch", "-i", "-", "-o", str(output), "--base-url", url]
    result = CliRunner().invoke(main, arguments, input=json.dumps(request(1)))
    assert result.exit_code == 1
    assert result.output == f"Error: nothing answers at {url} (--base-url): is `weft serve` running there?\n"
    assert output.read_text() == "the last answers"


def test_no_line_is_sent_to_what_takes_none(server: EchoServer, tmp_path: Path) -> None:
    server.takes_key = False
    other = grpc.server(ThreadPoolExecutor(1))
    grpc_port = other.add_insecure_port("127.0.0.1:0")
    other.start()
    grpc_url = f"http://127.0.0.1:{grpc_port}"
    for url, problem in {
        server.url: f"the service at {server.url} (--base-url) asks for a key, and --api-key has none that it takes",
        grpc_url: f"what answers at {grpc_url} (--base-url) is not an HTTP service",
    }.items():
        arguments = ["run-batch", "-i", "-", "-o", str(tmp_path / "out.jsonl"), "--base-url", url]
        result = CliRunner().invoke(main, arguments, input=json.dumps(request(1)))
        assert (result.exit_code, result.output) == (1, f"Error: {problem}\n")
    other.stop(grace=None).wait()
    assert not server.keys
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_found_before_a_service_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("weft.cli.run_batch.local_service", lambda _: pytest.fail("a service was started"))
    arguments = ["run-batch", "-i", "-", "-o", str(tmp_path / "none/out.jsonl")]
    result = CliRunner().invoke(main, arguments, input="", catch_exceptions=False)
    assert result.exit_code == 1
    assert "No such file or directory" in result.output


def test_a_connection_that_was_idle_too_long_is_opened_again(server: EchoServer, tmp_path: Path) -> None:
    server.closes_idle = True
    results, _ = run(server, tmp_path, [json.dumps(request(i)) for i in range(5)], "--concurrency", "1")
    assert [result["error"] for result in results] == [None] * 5


def test_an_answer_that_is_not_json_is_no_bad_line(server: EchoServer, tmp_path: Path) -> None:
    server.answer = b"<html>"
    results, _ = run(server, tmp_path, [json.dumps(request(1))])
    assert results[0]["error"]["code"] == "invalid_answer"


def test_an_interrupt_does_not_run_the_lines_ahead() -> None:
    started: list[str] = []
    hold = threading.Event()

    class Runner(BatchRunner):
        def run(self, number: int, line: str) -> dict[str, Any]:
            started.append(line)
            if line != "0":
                hold.wait(10)
            return {}

    results = run_lines(Runner("http://127.0.0.1", None), map(str, range(8)), concurrency=2)
    next(results)
    results.close()
    hold.set()
    assert len(started) <= 3, "lines were run that nobody waits for"
