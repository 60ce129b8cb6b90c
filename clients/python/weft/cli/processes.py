"""Which processes of Weft run on this machine, and the CPU time they used (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_FIELD_UTIME = 11  # of /proc/PID/stat, counted after the command's name
# By a part of the command line, the most telling first.
_ROLES = (
    ("weft_backend.engine_process", "engine"),
    ("weft_backend", "backend I/O"),
    ("weft_frontend", "frontend"),
)


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far, user and system, by role: frontend, backend I/O, engine."""
    totals: dict[str, float] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            role = next((role for part, role in _ROLES if f"-m {part}" in command), None)
            if role:
                totals[role] = totals.get(role, 0.0) + _cpu_seconds(process)
        except OSError:  # it ended meanwhile
            continue
    return totals


def _cpu_seconds(process: Path) -> float:
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[_FIELD_UTIME]) + int(fields[_FIELD_UTIME + 1])) / _TICKS
