"""What every engine process does around its engine: the channel, signals, its end, and the words it leaves."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable

from weft_backend.channel import EngineChannel, Kind
from weft_backend.engine import Engine
from weft_backend.errors import ChannelClosed, StartupError

_PR_SET_PDEATHSIG = 1


def serve(channel_fd: int, build: Callable[[EngineChannel], Engine]) -> int:
    """Build an engine and run it until the I/O process is gone; the exit status."""
    logging.basicConfig(level=logging.INFO, format="weft engine: %(message)s")
    follow_parent()
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


def end_now(channel: EngineChannel, last_words: str) -> None:
    """End the process from any thread, whatever the others do."""
    os._exit(_end(channel, last_words))


def _end(channel: EngineChannel, last_words: str) -> int:
    channel.send(Kind.FATAL, payload=last_words.encode())
    channel.close()
    return 1


def follow_parent() -> None:
    """End with the process that started this one, even from inside a hung kernel, where a pipe's end is not seen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
