"""``weft[frontend]`` in an environment of its own: no torch, and a frontend that serves, small and fast to start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
from deployment import Process
from ports import free_port

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "backend/weft_backend/weft_tiny"
ABSENT = ("torch", "transformers", "triton", "numpy")

MAX_RSS_BYTES = 150e6
MAX_START_SECONDS = 4.0  # 2 on an idle machine


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def python(tmp_path: Path) -> str:
    """The interpreter of an environment that has ``weft[frontend]`` and nothing else."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    interpreter = tmp_path / "venv/bin/python"
    run(interpreter, "-m", "pip", "install", "--quiet", "--constraint", "constraints.txt", ".[frontend]", cwd=ROOT)
    return str(interpreter)


def complete(port: int) -> str:
    body = {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(json.load(answer)["choices"][0]["text"])


@pytest.mark.slow
def test_it_installs_and_serves(python: str, tmp_path: Path) -> None:
    specs = f"import importlib.util as u; print([n for n in {ABSENT} if u.find_spec(n)], u.find_spec('weft').origin)"
    found = run(python, "-c", specs, cwd=tmp_path)
    assert found.startswith("[] "), found
    assert str(tmp_path / "venv") in found, "it is not the installed package that runs"
    assert not [*ROOT.glob("build"), *ROOT.glob("dist"), *ROOT.glob("*.egg-info")]

    backend_port, port = free_port(), free_port()
    fake = ["weft.testing", "--tokenizer", str(TOKENIZER), "--port", str(backend_port)]
    arguments = ["weft_frontend", "--backend", f"127.0.0.1:{backend_port}", "--host", "127.0.0.1", "--port", str(port)]
    with Process(*fake, python=python), Process(*arguments, "--grpc-port", "0", "--workers", "1", python=python) as one:
        one.wait_for(lambda: "ready in" in one.log.read_text())
        assert complete(port)
        start = re.search(r"ready in ([\d.]+) s", one.log.read_text())
        assert start is not None
        assert float(start[1]) <= MAX_START_SECONDS
        assert psutil.Process(one.pid).memory_info().rss <= MAX_RSS_BYTES
