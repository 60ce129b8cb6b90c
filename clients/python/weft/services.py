"""A backend and its frontends as child processes of this one.

The services are started as ``python -m weft_backend`` and ``python -m weft_frontend``; this package imports neither.
What they write goes on to this process's stderr, and the last line is kept for the error: it names the cause. Only what
they say of wrong arguments does not: whoever was given them says it, in its own terms.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress

from weft.errors import StartError

BACKEND, FRONTEND = "weft_backend", "weft_frontend"

# What the extras of pyproject.toml install for them; triton comes with a torch that needs it.
_MODULES_OF_BOTH = ("tokenizers", "prometheus_client", "grpc_health", "grpc_reflection")
MODULES = {
    BACKEND: ("torch", "numpy", "safetensors", "huggingface_hub", *_MODULES_OF_BOTH),
    FRONTEND: ("starlette", "uvicorn", "uvloop", "httptools", "orjson", "pydantic", "jinja2", *_MODULES_OF_BOTH),
}

API_KEY_VARIABLE = "WEFT_API_KEY"

USAGE_ERROR = 2  # exit code of a service whose arguments are wrong

# Asks Linux to end the child with its parent, even one that was killed, and becomes the service.
_BOUND_TO_PARENT = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); "
    "os.getppid() == int(sys.argv[1]) or os._exit(0); "
    "os.execv(sys.executable, [sys.executable, '-m', *sys.argv[2:]])"
)


def flags(options: Mapping[str, object]) -> list[str]:
    """Command-line flags of keyword arguments: ``max_num_seqs=8`` gives ``--max-num-seqs 8``.

    None gives nothing, a list or tuple its flag for each item. True gives ``--name``; False gives ``--no-name`` for
    names that begin with ``enable_``, and nothing for other switches, which are off unless given.
    """
    arguments: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            if value or flag.startswith("enable-"):
                arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            for item in value if isinstance(value, list | tuple) else [value]:
                arguments += [f"--{flag}", str(item)]
    return arguments


def check_installed(*services: str) -> None:
    """Raise StartError, which names what to install, if a module that services need is not there."""
    extra = services[0].removeprefix("weft_") if len(services) == 1 else "all"
    for module in (module for service in services for module in (service, *MODULES[service])):
        if importlib.util.find_spec(module) is None:
            raise StartError(f"{module} is not installed: pip install 'weft[{extra}]'")


class Service:
    """One running service. It ends when this process ends (on Linux, when the thread that started it ends)."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = module.removeprefix("weft_")
        self._last_line = "it wrote nothing"
        self._process = subprocess.Popen(
            _command(module, arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C in a terminal is for the parent, which drains in order
        )
        self._pump = threading.Thread(target=self._pass_on, name=f"weft-{self.name}-output", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def raise_if_ended(self) -> None:
        """Raise StartError, with the last line it wrote, if the service has ended."""
        if (exit_code := self._process.poll()) is not None:
            self._pump.join(timeout=1.0)
            if exit_code == USAGE_ERROR:
                raise StartError(self._last_line.removeprefix("Error: "), exit_code)
            raise StartError(f"the {self.name} ended with exit code {exit_code}: {self._last_line}", exit_code)

    def kill(self) -> None:
        """End it now; what it has started ends with it."""
        self._process.kill()

    def stop(self, grace: float, number: int = signal.SIGTERM) -> None:
        """Ask it to drain and end; kill it after ``grace`` seconds. At SIGINT a frontend does not wait first for
        balancers to notice."""
        self._process.send_signal(number)
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pump.join(timeout=1.0)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        is_usage = False
        for line in self._process.stdout:
            self._last_line = line.strip() or self._last_line
            is_usage = is_usage or line.startswith("Usage: ")  # of a command that nobody typed
            if not is_usage:
                with suppress(OSError):  # of a terminal that is gone: what is written is to be read all the same
                    sys.stderr.write(line)
                    sys.stderr.flush()


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    if sys.platform == "linux":
        return [sys.executable, "-ISc", _BOUND_TO_PARENT, str(os.getpid()), module, *arguments]
    return [sys.executable, "-m", module, *arguments]


def start_backend(address: str, arguments: Sequence[str]) -> Service:
    """A backend that listens at ``address``; the arguments are the rest of its command line. Raises StartError."""
    check_installed(BACKEND)
    return Service(BACKEND, ["--listen", address, *arguments])  # first, or a flag that lacks its value would take it


def check_joined(backend_arguments: Sequence[str]) -> None:
    """Raise StartError for an address of its own, at which a backend that is ours alone would not be found."""
    if any(argument.partition("=")[0] == "--listen" for argument in backend_arguments):
        raise StartError("--listen: is for `weft backend`; here the backend has a socket of its own")


class Stack:
    """A backend and a frontend in front of it, joined by a Unix socket that only this user can reach.

    The arguments are those of the services' command lines, without the address that joins them. A ``private`` frontend
    asks nobody for a key, whatever the environment says. The frontend starts in ``watch``, once the backend listens:
    of two command lines with a fault only one complains.
    """

    def __init__(
        self, backend_arguments: Sequence[str], frontend_arguments: Sequence[str], private: bool = False
    ) -> None:
        check_installed(BACKEND, FRONTEND)
        check_joined(backend_arguments)
        self._folder = tempfile.mkdtemp(prefix="weft-")
        self._socket = f"{self._folder}/backend.sock"
        self._frontend_arguments = ["--backend", f"unix:{self._socket}", *frontend_arguments]
        self._environment = os.environ | {"TMPDIR": self._folder}  # what a killed frontend leaves goes with the folder
        if private:
            self._environment.pop(API_KEY_VARIABLE, None)
        self.services = [start_backend(f"unix:{self._socket}", ["--require-tokenizer", *backend_arguments])]

    def watch(self) -> None:
        """To be called again and again. Raises StartError, with the last line it wrote, if a service has ended."""
        for service in self.services:
            service.raise_if_ended()
        if len(self.services) == 1 and os.path.exists(self._socket):
            self.services.append(Service(FRONTEND, self._frontend_arguments, self._environment))

    def kill(self) -> None:
        """End both now."""
        for service in reversed(self.services):
            service.kill()

    def stop(self, grace: float = 10.0, number: int = signal.SIGINT) -> None:
        """End the frontend, which drains, then the backend, as ``Service.stop`` does."""
        for service in reversed(self.services):
            service.stop(grace, number)
        shutil.rmtree(self._folder, ignore_errors=True)
