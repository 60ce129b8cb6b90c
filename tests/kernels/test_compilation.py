"""Kernels are compiled side by side, for a GPU that need not be there, and nothing is launched meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from weft_kernels.compilation import compiling

CPU = torch.device("cpu")
CORE = dict(vars(tl.core))  # as it is before any test: Triton's interpreter leaves some of its own functions there


class Hopper:
    """What Triton asks of a driver to compile for a GPU, and to load the kernel."""

    utils = SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 227 << 10},
        load_binary=lambda name, *_: (object(), name, 0, 0, 1024),
    )

    def launcher_cls(self, source: object, metadata: object) -> object:
        return threading.current_thread()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _add_kernel(x: tl.tensor, y: tl.tensor, BLOCK: tl.constexpr) -> None:
    index = tl.arange(0, BLOCK)
    tl.store(y + index, tl.load(x + index) + 1)


def _broken_kernel(x: tl.tensor, BLOCK: tl.constexpr) -> None:
    tl.store(x, tl.arange(0, BLOCK) @ unknown)  # type: ignore[name-defined]  # noqa: F821


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for name, value in CORE.items():
        monkeypatch.setattr(tl.core, name, value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    triton.runtime.driver.set_active(Hopper())
    yield
    if torch.cuda.is_available():
        triton.runtime.driver.reset_active()


def test_every_variant_is_there_when_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, compiled_in = JITFunction(_add_kernel), list[threading.Thread]()

    def note(**_: object) -> None:
        compiled_in.append(threading.current_thread())

    monkeypatch.setattr(triton.knobs.compilation, "listener", note)

    def rehearse() -> None:
        for size in (16, 32, 32, 64):
            kernel[(1,)](torch.empty(size, device=CPU), torch.empty(size, device=CPU), BLOCK=size)

    with compiling(rehearse, CPU) as compiled:
        launch = JITFunction.__getitem__
    variants = kernel.device_caches[0][0]
    assert sorted(variant.metadata.shared for variant in variants.values()) == [0, 0, 0]
    assert all(variant.asm["cubin"] for variant in variants.values())
    assert len(compiled_in) == 3
    assert compiled == ["_add_kernel"] * 3
    assert threading.main_thread() not in compiled_in
    assert "compile_only" not in launch.__qualname__


def test_a_kernel_that_does_not_compile_fails_where_it_is_launched() -> None:
    kernel = JITFunction(_broken_kernel)
    with compiling(lambda: kernel[(1,)](torch.empty(16, device=CPU), BLOCK=16), CPU) as compiled:
        pass
    assert not compiled
    with pytest.raises(triton.CompilationError):
        kernel[(1,)](torch.empty(16, device=CPU), BLOCK=16)


def test_a_launcher_keeps_its_function_when_another_is_loaded_again() -> None:
    source = """
        #include <Python.h>
        static PyObject *number(PyObject *self, PyObject *none) { return PyLong_FromLong(%d); }
        static PyMethodDef methods[] = {{"number", number, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL}};
        static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "launcher", NULL, -1, methods};
        PyMODINIT_FUNC PyInit_launcher(void) { return PyModule_Create(&module); }
    """
    with compiling(lambda: None, CPU):
        first, second, first_again = (
            triton.runtime.build.compile_module_from_src(source % number, "launcher") for number in (1, 2, 1)
        )
    assert (first.number(), second.number(), first_again.number()) == (1, 2, 1)
