"""The lines that a start prints: one a stage, with its seconds."""

from __future__ import annotations

import sys
import time


class Stage:
    """Prints a line when it ends well: ``with Stage("weights") as stage: stage.detail = …``."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start = time.monotonic()
        self.detail = ""

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if not failed:
            self.end(self.detail)

    def end(self, detail: str) -> None:
        """Print the line."""
        seconds = time.monotonic() - self._start
        print(f"weft: {self._name:9} {seconds:6.2f} s  {detail}", file=sys.stderr, flush=True)
