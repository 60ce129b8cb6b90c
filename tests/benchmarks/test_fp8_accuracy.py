"""The accuracy of float8, measured on a few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import fp8_accuracy
from checkpoints import make_checkpoint
from click.testing import CliRunner


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_accuracy, "NUM_TEXTS", 2)
    monkeypatch.setattr(fp8_accuracy, "TEXT_LEN", 24)


def test_float8_costs_more_than_bfloat16(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "tiny")
    file = tmp_path / "out.json"
    arguments = [str(tmp_path / "tiny"), "--layers", "1", "--device", "cpu", "--json", str(file)]
    result = CliRunner().invoke(fp8_accuracy.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    errors = {name: accuracy["logits_error"] for name, accuracy in json.loads(file.read_text()).items()}
    assert 0 < errors["bfloat16"] < min(errors["float8 weights"], errors["float8 KV cache"])
    assert max(errors.values()) < 0.1


def test_the_built_in_model_takes_its_exam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_accuracy, "VARIANTS", {"both": ("fp8", fp8_accuracy.FLOAT8)})
    arguments = ["--questions", "1", "--device", "cpu"]
    result = CliRunner().invoke(fp8_accuracy.main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert float(result.output.rpartition("exam ")[2].rstrip("%\n")) > 80
