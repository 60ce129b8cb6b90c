"""Weft's Python face: ``LLM`` for offline inference, ``Client`` and ``AsyncClient`` for a running service.

Names load when first used, so that importing a stub or ``weft.limits`` costs nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.aio import AsyncClient
    from weft.client import Client
    from weft.errors import WeftError
    from weft.llm import LLM
    from weft.outputs import CompletionOutput, RequestOutput
    from weft.sampling_params import SamplingParams, StructuredOutputs

__all__ = [
    "LLM",
    "AsyncClient",
    "Client",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputs",
    "WeftError",
    "__version__",
]

_MODULES = {
    "LLM": "weft.llm",
    "AsyncClient": "weft.aio",
    "Client": "weft.client",
    "CompletionOutput": "weft.outputs",
    "RequestOutput": "weft.outputs",
    "SamplingParams": "weft.sampling_params",
    "StructuredOutputs": "weft.sampling_params",
    "WeftError": "weft.errors",
}


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("weft")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'weft' has no attribute {name!r}")
