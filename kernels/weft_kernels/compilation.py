"""Compiling kernels side by side: left to itself, Triton compiles each where it is first launched, which waits for it.

Most of a compilation, the passes of MLIR and LLVM, the assembler and the C compiler, runs without Python's lock, so
threads suffice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from threading import Event
from types import ModuleType
from typing import Any

import torch
from triton.runtime import build
from triton.runtime._async_compile import AsyncCompileMode
from triton.runtime.jit import JITFunction


@contextmanager
def compiling(rehearse: Callable[[], None], device: torch.device) -> Iterator[list[str]]:
    """Compile whatever ``rehearse`` launches, and load it on ``device``, while the block runs; that waits for the end.

    A launch by ``rehearse`` runs nothing. Gives the names of the variants that are ready after the block; one that does
    not compile is left to fail where it is launched.
    """
    with _launchers_apart(), _Threads(device) as threads, AsyncCompileMode(threads, ignore_errors=True):
        try:
            with _launches_only_compile():
                rehearse()
        finally:
            threads.begun.set()
        yield threads.compiled


class _Threads(ThreadPoolExecutor):
    """Threads that compile, once they have ``begun``: before, they would take Python's lock from the rehearsal."""

    def __init__(self, device: torch.device) -> None:
        self.begun = Event()
        self.compiled: list[str] = []
        super().__init__(initializer=self._begin, initargs=(device,))

    def _begin(self, device: torch.device) -> None:
        self.begun.wait()
        torch.cuda.set_device(device)

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:  # type: ignore[override]
        return super().submit(self._compile_and_load, compile_kernel)

    def _compile_and_load(self, compile_kernel: Callable[[], Any]) -> Any:
        kernel = compile_kernel()
        kernel.run  # noqa: B018  # loads the kernel, and compiles the C function that launches it
        self.compiled.append(kernel.name)
        return kernel


@contextmanager
def _launches_only_compile() -> Iterator[None]:
    launch = JITFunction.__getitem__

    def compile_only(kernel: JITFunction, grid: Any) -> Any:
        return partial(kernel.warmup, grid=grid)

    JITFunction.__getitem__ = compile_only
    try:
        yield
    finally:
        JITFunction.__getitem__ = launch


@contextmanager
def _launchers_apart() -> Iterator[None]:
    """Load each of the C functions that launch as a module of its own name.

    Triton gives all modules one name. A second load of the same file puts its function into the module that has the
    name by then, another kernel's, whose thread may not have looked into it yet: a start failed with "function takes
    exactly 41 arguments (26 given)".
    """
    load: Callable[[str, str], ModuleType] = build._load_module_from_path

    def load_apart(name: str, path: str) -> ModuleType:
        return load(f"{sha256(path.encode()).hexdigest()}.{name}", path)  # Python calls PyInit_ of the last part

    build._load_module_from_path = load_apart
    try:
        yield
    finally:
        build._load_module_from_path = load
