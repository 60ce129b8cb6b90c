"""Many prompts in few calls: prompts of equal parameters share a stream, and what is under way is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

from weft.sampling_params import SamplingParams
from weft.text_limits import MAX_PROMPTS

Item = TypeVar("Item")
Result = TypeVar("Result")

_COST_OF_PROMPT = 128  # tokens; what a prompt costs the services besides its own tokens
_MAX_BATCH_COST = 1 << 17
_MAX_COST_UNDER_WAY = 1 << 19  # well below Limits.max_queued_tokens, and enough for thousands of short prompts


@dataclass(frozen=True, slots=True)
class Batch:
    """Prompts, by their index, that one request carries."""

    indexes: list[int]
    params: SamplingParams | None
    cost: int


def make_batches(prompt_lens: Sequence[int], params: Sequence[SamplingParams | None]) -> Iterator[Batch]:
    """Group prompts of equal parameters, in order, within the cap on prompts and on cost."""
    groups: dict[bytes, list[int]] = {}
    for index, param in enumerate(params):
        key = param.to_proto().SerializeToString(deterministic=True) if param else b""
        groups.setdefault(key, []).append(index)
    for group in groups.values():
        indexes: list[int] = []
        cost = 0
        for index in group:
            next_cost = prompt_lens[index] + _COST_OF_PROMPT
            if indexes and (len(indexes) == MAX_PROMPTS or cost + next_cost > _MAX_BATCH_COST):
                yield Batch(indexes, params[indexes[0]], cost)
                indexes, cost = [], 0
            indexes.append(index)
            cost += next_cost
        yield Batch(indexes, params[indexes[0]], cost)


class Budget:
    """Bounds the cost of the batches under way; a batch of more than the whole budget runs alone."""

    def __init__(self, size: int = _MAX_COST_UNDER_WAY) -> None:
        self._size = self._free = size
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def reserve(self, cost: int) -> AsyncIterator[None]:
        """Wait until ``cost`` is free, and hold it."""
        cost = min(cost, self._size)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= cost)
            self._free -= cost
        try:
            yield
        finally:
            async with self._changed:
                self._free += cost
                self._changed.notify_all()


async def for_each(
    function: Callable[[Item], Awaitable[Result]], items: Iterable[Item], most_at_once: int
) -> list[Result]:
    """Results in the items' order. The first error cancels the rest and is raised."""
    gate = asyncio.Semaphore(most_at_once)

    async def run(item: Item) -> Result:
        async with gate:
            return await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
