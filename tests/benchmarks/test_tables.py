"""Results as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.tables import engine_rows, label, main, number
from click.testing import CliRunner


def test_tables_of_every_kind_of_file(tmp_path: Path) -> None:
    times = {f"{time}_ms_{kind}": value for time, value in (("ttft", 20.0), ("tpot", 1.5)) for kind in ("mean", "p99")}
    peer = {f"{kind}_{time}_ms": 30.0 for time in ("ttft", "tpot") for kind in ("mean", "p99")}
    contents: dict[str, Any] = {
        "engine": {
            "shape": "tiny",
            "date": "2026-01-01",
            "arguments": ["--block-size", "16"],
            "weft": {"engine": "weft 1", "decode_ms_b1_ctx1k": 4.0},
            "vllm": {"engine": "vllm 1", "decode_ms_b1_ctx1k": 5.0},
            "floor": {"engine": None, "decode_ms_b1_ctx1k": 3.0},
        },
        "kernels": {
            **{"date": "2026-01-01", "gpu": "G", "torch": "2", "triton": "3", "ceilings": {"copy_tb_s": 4.0}},
            "timings": [
                {"kernel": "k", "size": "s", "us": 12.34, "tb_s": 2.0, "tflop_s": 30.0, "share": 0.5},
                "a case that failed",
            ],
        },
        "weft_grpc": [{"streams": 64, "out_tok_s": 20_000.0, "frontend cpu_percent": 150.0, **times}],
        "vllm": {"max_concurrency": 64, "output_throughput": 15_000.0, **peer},
    }
    files = []
    for name, content in contents.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(content))
    lines = CliRunner().invoke(main, list(map(str, files))).output.splitlines()
    assert "| decode step at context 1k, batch 1, ms | 4.00 | 5.00 | 3.00 | 1.25 | 75 % |" in lines
    assert "| k, s | 12.3 | 2.00 | 30 | 50 % |" in lines
    assert "| weft_grpc | 64 | 20,000 | 20.0 / 20.0 | 1.50 / 1.50 | 1.50 |" in lines
    assert "| vllm | 64 | 15,000 | 30.0 / 30.0 | 30.0 / 30.0 | – |" in lines


def test_columns_in_which_nothing_stands_are_left_out() -> None:
    report: dict[str, Any] = {"weft": {"decode_ms_b1_ctx1k": 4.0}, "floor": {"decode_ms_b1_ctx1k": None}}
    assert engine_rows(report) == [("", "Weft"), ("decode_ms_b1_ctx1k", "4.00")]
    report["vllm"] = {"decode_ms_b1_ctx1k": 5.0}
    assert engine_rows(report)[0] == ("", "Weft", "vLLM", "× vLLM")


@pytest.mark.parametrize(
    "content", ["", "5", "null", "{}", "[1]", '[{"streams": 1}]', '{"floor": {}}', '{"weft": {}, "floor": {"x": 1}}']
)
def test_other_files_are_refused_by_name(content: str, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    result = CliRunner().invoke(main, [str(file)])
    assert result.exit_code == 1
    assert result.output == f"Error: {file}: is not a file of results, as --help lists them\n"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.305, "0.30"), (12.885, "12.9"), (99.96, "100.0"), (1196.2, "1,196")]
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_every_result_has_a_label() -> None:
    names = ["start_s", "decode_ms_b64_ctx1k", "prefill_ms_b1_1k", "prefill_ms_b8_1k", "prefill_ms_4k"]
    names += ["mixed256_out_tok_s", "service256_out_tok_s"]
    labels = [label(name) for name in names]
    assert not any("_" in text for text in labels)
    assert len(set(labels)) == len(names)
