from __future__ import annotations

import pytest
from benchmarks import host_loop


@pytest.mark.parametrize("replaced", [False, True])
def test_every_phase_of_every_step_is_timed(replaced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_loop, "OUTPUT_LEN", 8)  # so that requests end
    times = host_loop.measure(3, num_sessions=2, replaced=replaced, prefix_cache=True, num_steps=40)
    assert {phase: len(column) for phase, column in times.items()} == dict.fromkeys(host_loop.PHASES, 40)
    assert all((column > 0).all() for column in times.values())
