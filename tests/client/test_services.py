"""Child processes: their flags, their last words, and their end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from weft.errors import StartError
from weft.services import BACKEND, FRONTEND, MODULES, Service, Stack, check_installed, flags


def test_flags_of_keyword_arguments() -> None:
    options = {"dtype": "float32", "max_num_seqs": 8, "revision": None, "api_key": ("a", "b")}
    assert flags(options) == ["--dtype", "float32", "--max-num-seqs", "8", "--api-key", "a", "--api-key", "b"]
    assert flags({"enforce_eager": True, "enable_prefix_caching": False}) == [
        "--enforce-eager",
        "--no-enable-prefix-caching",
    ]
    assert flags({"enforce_eager": False}) == []


def test_what_a_service_wrote_last_is_in_the_error(capfd: pytest.CaptureFixture[str]) -> None:
    service = Service("weft_missing", [])
    with pytest.raises(StartError, match=r"exit code 1: .*No module named weft_missing") as caught:
        _wait_for_end(service)
    assert caught.value.exit_code == 1
    assert capfd.readouterr().err.count("No module named weft_missing") == 1


def test_wrong_arguments_are_told_by_the_caller_alone(capfd: pytest.CaptureFixture[str]) -> None:
    service = Service(FRONTEND, ["--no-such-flag"])
    with pytest.raises(StartError, match=r"^No such option '--no-such-flag'\.$") as caught:
        _wait_for_end(service)
    assert caught.value.exit_code == 2
    assert capfd.readouterr().err == ""


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODULES, FRONTEND, ("json", "weft_no_such"))
    with pytest.raises(StartError, match=r"^weft_no_such is not installed: pip install 'weft\[frontend\]'$"):
        check_installed(FRONTEND)
    with pytest.raises(StartError, match=r"'weft\[all\]'"):
        Stack([], [])


@pytest.mark.parametrize("service", [BACKEND, FRONTEND])
def test_the_modules_that_are_looked_for_are_those_of_the_extra(service: str) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extra = project["optional-dependencies"][service.removeprefix("weft_")]
    wanted = {match[0] for requirement in extra if (match := re.match(r"[\w-]+", requirement))} - {"triton"}
    found = packages_distributions()
    assert {found[module][0].lower().replace("_", "-") for module in MODULES[service]} == wanted


def _wait_for_end(service: Service) -> None:
    for _ in range(200):
        service.raise_if_ended()
        time.sleep(0.05)


def test_stopping(tmp_path: Path) -> None:
    service = Service("http.server", ["0", "--directory", str(tmp_path)])
    service.raise_if_ended()
    service.stop(grace=5)
    assert not _runs(service.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends children with their parent")
def test_a_service_ends_with_a_parent_that_was_killed() -> None:
    script = (
        "import time; from weft.services import Service; "
        "print(Service('http.server', ['0']).pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert _runs(child)
    time.sleep(0.5)  # it becomes the service first
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not yet collected does not."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return not Path("/proc").exists()
    return False
