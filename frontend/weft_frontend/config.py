"""Settings of a frontend process: frozen, resolved before anything starts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MAX_WORKERS = 256  # each is a process of some 100 MB
MAX_MESSAGE_BYTES = (1 << 31) - 1  # gRPC's
MAX_SECONDS = (1 << 32) // 1000  # timeouts go to backends as 32 bits of milliseconds

_ADDRESS = re.compile(r"unix(?:-abstract)?:.+|.+:(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontendConfig:
    """What `weft frontend` was told."""

    backends: tuple[str, ...]  # gRPC targets: host:port, dns:///name:port or unix:/path
    host: str = "0.0.0.0"
    http_port: int | None = 8000  # None: no HTTP
    grpc_port: int | None = 50051  # None: no gRPC
    grpc_listen: str | None = None  # replaces host and grpc_port: host:port or unix:/path
    workers: int = 1  # processes that share the ports
    served_model_names: Mapping[str, str] = field(default_factory=dict)  # public name -> backend's name; empty: all,
    # under their own names
    chat_template: Path | None = None  # replaces the template of every model
    trust_request_chat_template: bool = False  # render templates that requests bring
    max_request_bytes: int = 2 << 20  # HTTP body or gRPC message; 2 MiB of token ids in JSON hold the loop 50 ms
    request_timeout: float | None = None  # seconds; the default deadline of a request
    api_keys: frozenset[str] = frozenset()  # empty: no authentication
    drain_timeout: float = 30.0  # seconds that running requests get after SIGTERM

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError("a frontend needs at least one backend: --backend HOST:PORT")
        if self.http_port is None and self.grpc_address is None:
            raise ValueError("both protocols are off: give --port or --grpc-port")
        if not self.host:
            raise ValueError("--host is empty: 0.0.0.0 is every address of this machine")
        if self.grpc_listen is not None and not _is_address(self.grpc_listen):
            raise ValueError(f"--grpc-listen takes HOST:PORT or unix:/PATH, not {self.grpc_listen!r}")
        for target in self.backends:
            if not _is_address(target):
                raise ValueError(f"--backend takes HOST:PORT, dns:///NAME:PORT or unix:/PATH, not {target!r}")
        if len(set(self.ports.values())) < len(self.ports):
            raise ValueError(f"--port and --grpc-port are both {self.http_port}")
        if any(not (key and key == key.strip() and key.isascii() and key.isprintable()) for key in self.api_keys):
            raise ValueError("--api-key: a key must be printable ASCII, not empty, and without a space at its ends")
        _check_range("--workers", self.workers, 1, MAX_WORKERS)
        _check_range("--max-body-bytes", self.max_request_bytes, 1, MAX_MESSAGE_BYTES)
        _check_range("--drain-timeout", self.drain_timeout, 0, MAX_SECONDS)
        if self.request_timeout is not None:
            _check_range("--request-timeout", self.request_timeout, 0.001, MAX_SECONDS)
        if self.workers > 1 and (self.grpc_listen or "").startswith("unix:"):
            raise ValueError("a Unix socket cannot be shared: give --workers 1")

    @property
    def http_address(self) -> str | None:
        """Where HTTP listens; None: nowhere."""
        return _address(self.host, self.http_port)

    @property
    def grpc_address(self) -> str | None:
        """Where gRPC listens; None: nowhere."""
        return self.grpc_listen or _address(self.host, self.grpc_port)

    @property
    def ports(self) -> dict[str, tuple[str, int]]:
        """(host, port) of each TCP address, by the flag that gave the port."""
        grpc_flag = "--grpc-listen" if self.grpc_listen else "--grpc-port"
        addresses = {"--port": self.http_address or "unix:", grpc_flag: self.grpc_address or "unix:"}
        pairs = {flag: text.rpartition(":") for flag, text in addresses.items() if not text.startswith("unix:")}
        return {flag: (host.strip("[]"), int(port)) for flag, (host, _, port) in pairs.items()}


def _check_range(flag: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:  # as NaN is not
        raise ValueError(f"{flag} {value}: must be in [{low}, {high}]")


def _is_address(text: str) -> bool:
    match = _ADDRESS.fullmatch(text)
    if match is None or text.startswith(("http://", "https://")):
        return False
    return match[1] is None or 0 < int(match[1]) < 1 << 16


def _address(host: str, port: int | None) -> str | None:
    if port is None:
        return None
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"  # an IPv6 address is bracketed


def parse_served_model_names(names: tuple[str, ...]) -> dict[str, str]:
    """``--served-model-name`` values: ``NAME`` serves a model under its own name, ``ALIAS=NAME`` under another."""
    served: dict[str, str] = {}
    for name in names:
        alias, _, target = name.partition("=")
        if not alias or name.endswith("="):
            raise ValueError(f"--served-model-name takes NAME or ALIAS=NAME, not {name!r}")
        if alias in served:
            raise ValueError(f"--served-model-name gives {alias!r} twice")
        served[alias] = target or alias
    return served
