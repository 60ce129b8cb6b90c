"""The progress bar of offline inference."""

from __future__ import annotations

from tqdm import tqdm


class Progress:
    """A bar of requests done, with tokens per second; or none."""

    def __init__(self, num_requests: int, shown: bool) -> None:
        self._bar = tqdm(total=num_requests, unit="req", desc="Processed prompts", disable=not shown)
        self._num_tokens = 0

    def add(self, num_tokens: int, finished: bool) -> None:
        """Count generated tokens, and a request if it has finished."""
        self._num_tokens += num_tokens
        if finished and not self._bar.disable:
            seconds = self._bar.format_dict["elapsed"] or 1e-9
            self._bar.set_postfix_str(f"{self._num_tokens / seconds:.1f} tok/s", refresh=False)
            self._bar.update()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()
