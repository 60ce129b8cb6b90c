"""A backend and its frontends as child processes of this one.

The services are started as ``python -m weft_backend`` and ``python -m weft_frontend``; this package imports neither.
What they write goes on to this process's stderr, and the last lines are kept for the error that names the cause.
"""

from __future__ import annotations

import collections
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence

from weft.errors import StartError

BACKEND, FRONTEND = "weft_backend", "weft_frontend"

API_KEY_VARIABLE = "WEFT_API_KEY"

_TAIL_LINES = 30
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


class Service:
    """One running service. It ends when this process ends (on Linux, when the thread that started it ends)."""

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.name = module.removeprefix("weft_")
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
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
        """Raise StartError, with what it wrote last, if the service has ended."""
        if self._process.poll() is not None:
            self._pump.join(timeout=1.0)
            written = "".join(self._tail).strip() or "(it wrote nothing)"
            raise StartError(f"the {self.name} ended with exit code {self._process.returncode}:\n{written}")

    def kill(self) -> None:
        """End it now; what it has started ends with it."""
        self._process.kill()

    def stop(self, grace: float) -> None:
        """Ask it to drain and end; kill it after ``grace`` seconds."""
        self._process.terminate()
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._pump.join(timeout=1.0)

    def _pass_on(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    if sys.platform == "linux":
        return [sys.executable, "-ISc", _BOUND_TO_PARENT, str(os.getpid()), module, *arguments]
    return [sys.executable, "-m", module, *arguments]


class Stack:
    """A backend and a frontend in front of it, joined by a Unix socket that only this user can reach.

    The arguments are those of the services' command lines, without the address that joins them. A ``private`` frontend
    asks nobody for a key, whatever the environment says.
    """

    def __init__(
        self, backend_arguments: Sequence[str], frontend_arguments: Sequence[str], private: bool = False
    ) -> None:
        self._folder = tempfile.mkdtemp(prefix="weft-")
        joint = f"unix:{self._folder}/backend.sock"
        environment = {name: value for name, value in os.environ.items() if not (private and name == API_KEY_VARIABLE)}
        self.backend = Service(BACKEND, [*backend_arguments, "--listen", joint])
        self.frontend = Service(FRONTEND, ["--backend", joint, *frontend_arguments], environment)

    def raise_if_ended(self) -> None:
        """Raise StartError, with what it wrote last, if a service has ended."""
        self.backend.raise_if_ended()
        self.frontend.raise_if_ended()

    def kill(self) -> None:
        """End both now."""
        self.frontend.kill()
        self.backend.kill()

    def stop(self, grace: float = 10.0) -> None:
        """End the frontend, which drains, then the backend; each is killed after ``grace`` seconds."""
        self.frontend.stop(grace)
        self.backend.stop(grace)
        shutil.rmtree(self._folder, ignore_errors=True)
