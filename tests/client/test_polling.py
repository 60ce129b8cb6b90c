"""How gRPC waits is settled before it is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SHOW = "import os, sys, {}; print(os.environ['GRPC_EXPERIMENTS'], 'grpc' in sys.modules)"


@pytest.mark.parametrize("package", ["weft.cli", "weft_backend", "weft_frontend"])
@pytest.mark.parametrize("given", [None, "tcp_frame_size_tuning"])
def test_packages_of_processes_settle_it_first(package: str, given: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    environment |= {"GRPC_EXPERIMENTS": given} if given else {}
    shown = subprocess.run(
        [sys.executable, "-c", _SHOW.format(package)], env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split() == [given or "-event_engine_client,-event_engine_listener", "False"]
