"""The steps that the profile times, run on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks import step_profile
from checkpoints import make_checkpoint


def test_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_profile, "DEVICE", torch.device("cpu"))
    make_checkpoint("llama", tmp_path / "tiny")
    runner = step_profile.make_runner(tmp_path / "tiny", max_num_seqs=2, page_size=16)
    for chunk, new in ((0, True), (0, False), (16, False)):
        plan = step_profile.make_plan(runner, num_rows=2, context=32, chunk=chunk, new=new)
        assert len(runner.collect(runner.launch(plan)).token_ids) == 2
