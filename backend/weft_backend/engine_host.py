"""What every engine process does around its engine: the channel, signals, its end, and the words it leaves."""

from __future__ import annotations

import ctypes
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable

from weft_backend.channel import EngineChannel, Kind
from weft_backend.engine import Engine
from weft_backend.errors import ChannelClosed, StartupError

_PR_SET_PDEATHSIG = 1


def serve(channel_fd: int, build: Callable[[EngineChannel], Engine]) -> int:
    """Build an engine and run it until the I/O process is gone; the exit status."""
    logging.basicConfig(level=logging.INFO, format="weft engine: %(message)s")
    _follow_parent()
    channel = EngineChannel(socket.socket(fileno=channel_fd))
    try:
        engine = build(channel)
        gc.collect()
        gc.freeze()  # the model is never garbage: a full collection would walk it in the middle of a step
        engine.run()
    except ChannelClosed:
        return 0
    except StartupError as error:
        return _end(channel, str(error))
    except Exception as error:
        logging.getLogger(__name__).exception("the engine failed")
        return _end(channel, f"the engine failed: {type(error).__name__}: {error}")
    raise AssertionError("an engine runs until it is ended")


def _end(channel: EngineChannel, last_words: str) -> int:
    channel.send(Kind.FATAL, payload=last_words.encode())
    channel.close()
    return 1


def _follow_parent() -> None:
    """Leave Ctrl-C and SIGTERM to the I/O process, which drains, and end with it even from inside a hung kernel."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Stage:
    """Prints one line with the seconds that a stage of the start took: ``with Stage("weights"): …``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.detail = ""

    def __enter__(self) -> Stage:
        self._start = time.monotonic()
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            seconds = time.monotonic() - self._start
            print(f"weft: {self._name:8} {seconds:6.2f} s  {self.detail}", file=sys.stderr, flush=True)
