from __future__ import annotations

import socket
import threading
import time

import pytest

from weft_backend.channel import EngineChannel, Kind, Message, Splitter, encode
from weft_backend.errors import ChannelClosed


@pytest.fixture
def ends() -> tuple[EngineChannel, socket.socket]:
    ours, theirs = socket.socketpair()
    return EngineChannel(ours), theirs


def test_splitter_takes_any_cut_of_the_stream() -> None:
    messages = [Message(Kind.STEP, 7, b"x" * 300), Message(Kind.LOAD, 0, b""), Message(Kind.FATAL, 0, b"end")]
    stream = b"".join(encode(*message) for message in messages)
    for size in (1, 2, 9, 10, 100, len(stream)):
        splitter = Splitter()
        pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
        assert [message for piece in pieces for message in splitter.feed(piece)] == messages


def test_receive_without_wait_returns_what_is_there(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, other = ends
    assert channel.receive(wait=False) == []
    other.sendall(encode(Kind.REQUEST, 3, b"abc"))
    assert channel.receive(wait=False) == [Message(Kind.REQUEST, 3, b"abc")]


def test_send_never_blocks_and_receive_sends_the_rest(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, other = ends
    payload = b"y" * (8 << 20)  # far more than a socket buffers
    channel.send(Kind.STEP, 1, payload)
    channel.flush()
    received: list[Message] = []

    def read_then_answer() -> None:
        splitter = Splitter()
        while not received:
            received.extend(splitter.feed(other.recv(1 << 20)))
        other.sendall(encode(Kind.SESSION_CLOSED, 1))

    reader = threading.Thread(target=read_then_answer)
    reader.start()
    assert channel.receive(wait=True) == [Message(Kind.SESSION_CLOSED, 1, b"")]
    reader.join()
    assert received == [Message(Kind.STEP, 1, payload)]


def test_a_long_wait_takes_no_cpu(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, other = ends
    threading.Timer(0.3, lambda: other.sendall(encode(Kind.REQUEST, 3))).start()
    begin = time.thread_time()
    assert channel.receive(wait=True) == [Message(Kind.REQUEST, 3, b"")]
    assert time.thread_time() - begin < 0.1


def test_the_other_ends_death_raises(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, other = ends
    other.close()
    with pytest.raises(ChannelClosed):
        channel.receive(wait=True)
    channel.send(Kind.STEP)
    with pytest.raises(ChannelClosed):
        channel.flush()


def test_close_sends_what_is_left_and_may_be_called_again(ends: tuple[EngineChannel, socket.socket]) -> None:
    channel, other = ends
    channel.send(Kind.FATAL, 0, b"end")
    channel.close()
    channel.close()
    assert other.recv(100) == encode(Kind.FATAL, 0, b"end")
