"""Which processes of Weft run on this machine, and the CPU time they used (Linux)."""

from __future__ import annotations

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_FIELD_PARENT, _FIELD_UTIME, _FIELD_STIME = 1, 11, 12  # of /proc/PID/stat, counted after the command's name
# By a part of the command line, the most telling first.
_ROLES = (
    ("-m weft_backend.engine_process", "engine"),
    ("-m weft_backend", "backend I/O"),
    ("-m weft_frontend", "frontend"),
)


class CpuMeter:
    """CPU time, user and system, from now on, of the frontends, I/O processes and engines that run now.

    ``parent``: count only processes below this one, for example a ``weft serve``.
    """

    def __init__(self, parent: int | None) -> None:
        self._parent = parent
        self._start = self._read()

    def seconds(self) -> dict[str, float]:
        """CPU seconds since the start, by role."""
        totals: dict[str, float] = {}
        for (pid, role), seconds in self._read().items():
            if (pid, role) in self._start:
                totals[role] = totals.get(role, 0.0) + seconds - self._start[pid, role]
        return totals

    def num_processes(self, role: str) -> int:
        """How many there were at the start."""
        return sum(found == role for _, found in self._start)

    def _read(self) -> dict[tuple[int, str], float]:
        found: dict[tuple[int, str], float] = {}
        parents: dict[int, int] = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            pid = int(folder.name)
            parents[pid] = int(fields[_FIELD_PARENT])
            role = next((role for part, role in _ROLES if part in command), None)
            if role:
                found[pid, role] = (int(fields[_FIELD_UTIME]) + int(fields[_FIELD_STIME])) / _TICKS
        return {key: seconds for key, seconds in found.items() if self._is_below(key[0], parents)}

    def _is_below(self, pid: int, parents: dict[int, int]) -> bool:
        while self._parent is not None and pid != self._parent:
            if pid not in parents:
                return False
            pid = parents[pid]
        return True
