"""`python -m weft_frontend`, which is `weft frontend`: the CPU service alone."""

from __future__ import annotations

import logging
import os
import sys
import time

_STARTED = time.perf_counter()

from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402

from weft_frontend.config import FrontendConfig, parse_served_model_names  # noqa: E402
from weft_frontend.ports import check_free  # noqa: E402
from weft_frontend.workers import run_worker, run_workers  # noqa: E402

_KEY_VARIABLE = "WEFT_API_KEY"
_PORT = click.IntRange(0, 65535)
MAX_DEFAULT_WORKERS = 4  # one worker carries about 15,000 tokens/s; four outrun most backends


def _default_workers(grpc_listen: str | None) -> int:
    if (grpc_listen or "").startswith("unix:"):
        return 1
    return min(MAX_DEFAULT_WORKERS, len(os.sched_getaffinity(0)))


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option("--backend", "backends", multiple=True, required=True, metavar="TARGET",
              help="gRPC target of a backend: host:port, dns:///name:port or unix:/path. Repeatable.")  # fmt: skip
@click.option("--host", default="0.0.0.0", help="Address to listen on.")
@click.option("--port", default=8000, type=_PORT, help="HTTP port; 0: no HTTP.")
@click.option("--grpc-port", default=50051, type=_PORT, help="gRPC port; 0: no gRPC.")
@click.option(
    "--grpc-listen", metavar="ADDRESS", help="gRPC address instead of host and port: host:port or unix:/path."
)
@click.option("--workers", type=click.IntRange(min=1), show_default="one per core, at most 4",
              help="Processes that share the ports.")  # fmt: skip
@click.option("--served-model-name", "names", multiple=True, metavar="[ALIAS=]NAME",
              help="Serve this model only, under an alias if one is given. Repeatable.")  # fmt: skip
@click.option("--chat-template", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Jinja file that replaces every model's chat template.")  # fmt: skip
@click.option("--trust-request-chat-template", is_flag=True, help="Render templates that requests bring.")
@click.option("--api-key", "api_keys", multiple=True, envvar=_KEY_VARIABLE, metavar="KEY", show_envvar=True,
              help="Ask clients for this key. Repeatable.")  # fmt: skip
@click.option("--max-body-bytes", default=2 << 20,
              help="Largest HTTP body or gRPC message.")  # fmt: skip
@click.option("--request-timeout", type=float, metavar="SECONDS", help="Deadline of requests that bring none.")
@click.option(
    "--drain-timeout", default=30.0, metavar="SECONDS", help="Time for running requests after SIGTERM; 0: none."
)
@click.option("--log-level", default="warning", type=click.Choice(["debug", "info", "warning", "error"]),
              help="What is logged.")  # fmt: skip
def main(
    backends: tuple[str, ...], host: str, port: int, grpc_port: int, grpc_listen: str | None, workers: int | None,
    names: tuple[str, ...], chat_template: Path | None, trust_request_chat_template: bool, api_keys: tuple[str, ...],
    max_body_bytes: int, request_timeout: float | None, drain_timeout: float, log_level: str,
) -> None:  # fmt: skip
    """Serve text over HTTP and gRPC from backends that serve tokens."""
    logging.basicConfig(level=log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        if not api_keys and _KEY_VARIABLE in os.environ:  # whoever set it wanted a key
            raise ValueError(f"{_KEY_VARIABLE} is empty: unset it to ask for no key")
        config = FrontendConfig(
            backends=backends,
            host=host,
            http_port=port or None,
            grpc_port=grpc_port or None,
            grpc_listen=grpc_listen,
            workers=workers or _default_workers(grpc_listen),
            served_model_names=parse_served_model_names(names),
            chat_template=chat_template,
            trust_request_chat_template=trust_request_chat_template,
            max_request_bytes=max_body_bytes,
            request_timeout=request_timeout,
            api_keys=frozenset(api_keys),
            drain_timeout=drain_timeout,
        )
        for flag, address in config.ports.items():
            check_free(flag, *address)
        (run_worker if config.workers == 1 else run_workers)(config, partial(_print_ready, config))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"weft frontend: {error}")


def _print_ready(config: FrontendConfig, models: list[str], backends: dict[str, bool]) -> None:
    places = [] if config.http_port is None else [f"http://{config.http_address}"]
    places += [] if config.grpc_address is None else [f"grpc {config.grpc_address}"]
    where = ", ".join(map(_reachable, places))
    seconds = time.perf_counter() - _STARTED
    missing = [target for target, in_use in backends.items() if not in_use]
    count = f"{len(backends) - len(missing)} of {len(backends)} backends"
    note = f" ({count}; not in use yet: {', '.join(missing)})" if missing else ""
    print(f"weft frontend: ready in {seconds:.1f} s: {', '.join(models)} on {where}{note}", flush=True)


def _reachable(address: str) -> str:
    """An address to click on: "every address of this machine" is none."""
    return address.replace("0.0.0.0:", "localhost:").replace("[::]:", "localhost:")


if __name__ == "__main__":
    main(prog_name="weft frontend")
