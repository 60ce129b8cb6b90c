"""The comparison on a tiny model, with a vLLM that only pretends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.compare_engines import main, medians, table
from benchmarks.vllm_engine import keywords
from checkpoints import make_checkpoint
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
PRETENDED = """
__version__ = "0"

class SamplingParams:
    def __init__(self, **values):
        self.__dict__ |= values

class Output:
    def __init__(self, token_ids):
        self.token_ids = token_ids
        self.outputs = [self]

class LLM:
    def __init__(self, model, **settings):
        assert settings["block_size"] == 16 and not settings["enable_prefix_caching"], settings

    def generate(self, prompts, sampling, use_tqdm):
        return [Output(range(one.max_tokens)) for one, _ in zip(sampling, prompts, strict=True)]
"""


@pytest.fixture
def vllm(tmp_path: Path) -> Path:
    """A folder with what pretends to be vLLM."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "vllm.py").write_text(PRETENDED)
    return folder


def compare(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "benchmarks.compare_engines", *arguments]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)


def test_both_engines_run_and_stand_side_by_side(vllm: Path, tmp_path: Path) -> None:
    shape, report_file = tmp_path / "tiny", tmp_path / "report.json"
    make_checkpoint("llama", shape)
    config = json.loads((shape / "config.json").read_text()) | {"max_position_embeddings": 2048}
    (shape / "config.json").write_text(json.dumps(config))
    arguments = ["--json", str(report_file), "--batches", "1", "--parts", "decode", "--block-size", "16"]
    result = compare(str(shape), "--vllm", str(vllm), *arguments)
    assert result.returncode == 0, result.stderr
    report = json.loads(report_file.read_text())
    assert report["weft"]["engine"].startswith("weft")
    assert report["vllm"]["engine"] == "vllm 0"
    for engine in ("weft", "vllm"):
        assert {"start_s", "decode_ms_b1_ctx1k", "prefill_ms_b1_1k"} <= set(report[engine])
    has_gpu = torch.cuda.is_available()
    assert result.stdout.startswith(f"tiny: weft and vllm{'' if has_gpu else ', without a GPU: no floors'}\n")
    assert ("floor" in result.stdout.splitlines()[-4]) == has_gpu
    assert [line.split()[0] for line in result.stdout.splitlines()[-3:]] == [
        "start_s",
        "decode_ms_b1_ctx1k",
        "prefill_ms_b1_1k",
    ]


def test_engines_that_fail_are_told(vllm: Path, tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "tiny")
    result = compare(str(tmp_path / "tiny"), "--vllm", str(vllm), "--no-such-option")
    assert result.returncode == 1
    assert "Error: vllm and weft failed" in result.stderr


def test_a_vllm_that_is_not_there_is_told_first(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path / "tiny")
    result = CliRunner().invoke(main, [str(tmp_path / "tiny"), "--vllm", f"{tmp_path}:/nope"])
    assert result.exit_code == 2
    assert "'--vllm'" in result.output


def test_ratios_say_how_fast_weft_is() -> None:
    report = {
        "shape": "x",
        "date": "2026-01-01",
        "weft": {"engine": "weft 1", "decode_ms_b1_ctx1k": 4.0, "mixed256_out_tok_s": 300.0, "start_s": 5.0},
        "vllm": {"engine": "vllm 1", "decode_ms_b1_ctx1k": 5.0, "mixed256_out_tok_s": 200.0},
        "floor": {"engine": None, "start_s": None, "decode_ms_b1_ctx1k": 3.0, "mixed256_out_tok_s": 400.0},
    }
    lines = [line.split() for line in table(report)]
    assert lines[0] == ["x:", "weft", "1,", "vllm", "1;", "2026-01-01"]
    assert lines[2:] == [
        ["start_s", "5.00", "–", "–", "–", "–"],
        ["decode_ms_b1_ctx1k", "4.00", "5.00", "3.00", "1.25", "75", "%"],
        ["mixed256_out_tok_s", "300", "200", "400", "1.50", "75", "%"],
    ]


def test_medians_of_turns_that_may_have_failed() -> None:
    turns = [{"engine": "a", "x": 1.0, "y": 5.0}, {}, {"engine": "a", "x": 2.0}, {"engine": "a", "x": 9.0}]
    assert medians(turns) == {"engine": "a", "x": 2.0, "y": 5.0}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--enforce-eager --tensor-parallel-size 2", {"enforce_eager": True, "tensor_parallel_size": 2}),
        ("--batches 1,8,64 --top-p 0.9", {"batches": "1,8,64", "top_p": 0.9}),
        ("--quantization fp8 --kv-cache-dtype fp8", {"quantization": "fp8", "kv_cache_dtype": "fp8"}),
    ],
)
def test_engine_options_as_keywords(arguments: str, expected: dict[str, object]) -> None:
    assert keywords(arguments.split()) == expected
