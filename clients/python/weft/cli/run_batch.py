"""``weft run-batch``: OpenAI's batch files, offline, over the HTTP API."""

from __future__ import annotations

import collections
import http.client
import json
import ssl
import threading
import time
import uuid
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
from tqdm import tqdm

from weft.cli.local import local_service
from weft.cli.options import COUNT, FORWARDING, api_key_option, check_url
from weft.errors import WeftError, unreachable
from weft.transport import bearer

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")

_MAX_TRIES = 8
_LINES_AHEAD = 4  # times the concurrency; results are written in the order of the input


class BadLine(ValueError):
    """A line of the input that is not a request; the message says why."""


class BatchRunner:
    """Sends lines to a service; each thread keeps its own connection."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        self._url = urlsplit(base_url)
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = bearer(api_key)
        self._local = threading.local()

    def check(self) -> None:
        """Raise Unavailable if nothing answers at the address, WeftError if that is no HTTP service or asks for another
        key, and OSError for a certificate.
        """
        url, connection = self._url.geturl(), self._connection()
        try:
            connection.request("GET", f"{self._url.path}/v1/models", headers=self._headers)
            status = connection.getresponse().status
        except ssl.SSLError:
            raise  # it is something that answers
        except (http.client.HTTPException, ConnectionResetError) as error:
            raise WeftError(f"what answers at {url} (--base-url) is not an HTTP service") from error
        except OSError as error:
            raise unreachable(url, "--base-url") from error
        finally:
            connection.close()
        if status == http.HTTPStatus.UNAUTHORIZED:
            raise WeftError(f"the service at {url} (--base-url) asks for a key, and --api-key has none that it takes")

    def run(self, number: int, line: str) -> dict[str, Any]:
        """The output line of input line ``number``: a response, or an error if it is bad or the service is gone."""
        name = f"batch_req_{uuid.uuid4().hex}"
        output: dict[str, Any] = {"id": name, "custom_id": None, "response": None, "error": None}
        try:
            request = json.loads(line.encode())
            output["custom_id"] = request.get("custom_id") if isinstance(request, dict) else None
            check_line(request)
            payload = json.dumps(request["body"]).encode()
        except (ValueError, RecursionError) as error:
            # Its text has lines of its own.
            message = f"is not JSON: {error.msg}" if isinstance(error, json.JSONDecodeError) else error
            return {**output, "error": {"code": "invalid_line", "message": f"line {number}: {message}"}}
        try:
            return {**output, "response": self._post(request["url"], payload)}
        except (OSError, http.client.HTTPException) as error:
            return {**output, "error": {"code": "connection_error", "message": str(error)}}
        except ValueError as error:
            return {**output, "error": {"code": "invalid_answer", "message": f"the answer is not JSON: {error}"}}

    def _post(self, path: str, body: bytes) -> dict[str, Any]:
        for attempt in range(_MAX_TRIES):
            response, data = self._send(path, body)
            if response.status not in (429, 503) or attempt == _MAX_TRIES - 1:
                break
            time.sleep(float(response.headers.get("retry-after", 1)))
        return {
            "status_code": response.status,
            "request_id": response.headers.get("x-request-id"),
            "body": json.loads(data),
        }

    def _send(self, path: str, body: bytes) -> tuple[http.client.HTTPResponse, bytes]:
        if not hasattr(self._local, "connection"):
            self._local.connection = self._connection()
        connection = self._local.connection
        was_open = connection.sock is not None
        try:
            connection.request("POST", self._url.path + path, body, self._headers)
            response = connection.getresponse()
            return response, response.read()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if was_open and isinstance(error, ConnectionError):  # services close connections that were idle
                return self._send(path, body)
            raise

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._url.scheme == "https" else http.client.HTTPConnection
        return kind(self._url.netloc)


def check_line(request: Any) -> None:
    """Refuse what is not a request of OpenAI's batch format. Raises BadLine."""
    if not isinstance(request, dict):
        raise BadLine("must be a JSON object")
    if not isinstance(request.get("custom_id"), str):
        raise BadLine("custom_id: must be a string")
    if request.get("method") != "POST":
        raise BadLine("method: must be POST")
    if request.get("url") not in URLS:
        raise BadLine(f"url: must be one of {', '.join(URLS)}")
    if not isinstance(request.get("body"), dict):
        raise BadLine("body: must be a JSON object")
    if request["body"].get("stream"):
        raise BadLine("body.stream: a batch cannot stream")


def run_lines(runner: BatchRunner, lines: Iterable[str], concurrency: int) -> Generator[dict[str, Any], None, None]:
    """Output lines in the order of the input; ``concurrency`` requests are under way at once."""
    pending: collections.deque[Future[dict[str, Any]]] = collections.deque()
    pool = ThreadPoolExecutor(concurrency)
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                pending.append(pool.submit(runner.run, number, line))
            if len(pending) >= _LINES_AHEAD * concurrency:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt is not to wait for the lines ahead


@click.command("run-batch", context_settings=FORWARDING)
@click.option(
    "-i",
    "--input",
    "source",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    required=True,
    help='JSON lines to run; "-": standard input.',
)
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Where answers go."
)
@click.option(
    "--base-url",
    callback=check_url,
    help="A running service, for example http://localhost:8000. Default: start a private one.",
)
@api_key_option
@click.option("--concurrency", type=COUNT, default=256, show_default=True, help="Requests under way at once.")
@click.argument("arguments", metavar="[MODEL] [BACKEND OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def run_batch(
    source: str,
    output: Path,
    base_url: str | None,
    api_key: str | None,
    concurrency: int,
    arguments: tuple[str, ...],
) -> None:
    """Run an OpenAI batch file: each line has custom_id, method, url and body; answers are in the same order.

    Without --base-url a private service of MODEL, by default the built-in one, is started; other options are those of
    the backend, as `weft backend --help` lists them. Of requests that fail the output says why; the exit code is 1 only
    if every one did, or none could be sent.
    """
    if source != "-" and output.exists() and output.samefile(source):
        raise click.UsageError("-o is the input file: it would be emptied before it is read")
    if base_url and arguments:
        raise click.UsageError("MODEL and backend options have no effect with --base-url")
    if base_url:
        BatchRunner(base_url, api_key).check()
    output.open("a").close()  # a folder that is missing is found before a service is started
    num_done = num_failed = 0
    with (
        _service(base_url, arguments) as url,
        click.open_file(source, encoding="utf-8", errors="surrogateescape") as lines,  # a bad byte is its line's fault
        output.open("w", encoding="utf-8", errors="backslashreplace") as sink,
    ):
        results = run_lines(BatchRunner(url, api_key), lines, concurrency)
        for result in tqdm(results, unit="req", desc="Processed requests"):
            num_done += 1
            sink.write(json.dumps(result, ensure_ascii=False) + "\n")
            num_failed += result["error"] is not None or result["response"]["status_code"] != 200
    click.echo(f"{num_done} requests, {num_failed} failed", err=True)
    if num_failed == num_done > 0:
        raise click.ClickException(f"every request failed; {output} says why")


@contextmanager
def _service(base_url: str | None, arguments: tuple[str, ...]) -> Iterator[str]:
    """The URL of the running service, or of a private one."""
    if base_url:
        yield base_url
        return
    with local_service(arguments) as service:
        yield service.url
