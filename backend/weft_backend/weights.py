"""From safetensors into a model's parameters, region by region, so that no weight is ever held twice."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weft_backend.checkpoint import CheckpointError, weight_files
from weft_backend.layers import Source

DUMMY_STD = 0.02
_FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


def load_weights(sources: Iterable[Source], path: Path) -> None:
    """Fill every source's target from the safetensors in the folder ``path``.

    Raises CheckpointError, naming file and tensor, if a tensor is missing, unknown, of another shape, or not finite in
    the target's type, or if a file is damaged.
    """
    wanted: dict[str, list[Source]] = defaultdict(list)
    for source in sources:
        wanted[source.name].append(source)
    missing = set(wanted)
    files = weight_files(path)
    for file in files:
        missing -= _load_file(file, wanted)
    if missing:
        where = str(files[0]) if len(files) == 1 else f"{path}: none of {len(files)} weight files"
        verb = "lacks" if len(files) == 1 else "has"
        raise CheckpointError(f"{where} {verb} {min(missing)} ({len(missing)} of {len(wanted)} tensors are missing)")


def _load_file(file: Path, wanted: dict[str, list[Source]]) -> set[str]:
    """Copy the file's tensors to where they are wanted; returns their names."""
    try:
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            unknown = sorted(name for name in names - wanted.keys() if not _is_harmless(name))
            if unknown:
                raise CheckpointError(f"{file}: {unknown[0]} is no part of the model that config.json describes")
            for name in sorted(names & wanted.keys()):
                for source in wanted[name]:
                    _copy(file, tensors.get_slice(name), source)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    return names


def _is_harmless(name: str) -> bool:
    # Rotary frequencies are computed anew. Some writers store a tied head as a second copy; if the head is not tied,
    # it is wanted and this is not asked.
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"


def _copy(file: Path, stored: Any, source: Source) -> None:
    """Copy the source's region of a stored tensor (a safetensors slice, read lazily) to its target."""
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if shape != source.shape:
        raise CheckpointError(f"{file}: {source.name} is {list(shape)}, but config.json makes it {list(source.shape)}")
    if dtype not in _FLOAT_DTYPES:
        raise CheckpointError(f"{file}: {source.name} is of type {dtype}; only floats of 16 bits or more are supported")
    source.fill(stored[source.region or (slice(None),)])
    if not source.is_finite():
        target_dtype = str(source.target.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{file}: {source.name} has values that are not finite in {target_dtype}; "
            "the file is damaged, or needs a wider --dtype"
        )


def fill_with_noise(sources: Iterable[Source], seed: int) -> None:
    """Draw weights, for measurements without a checkpoint: norms do nothing, all else is small.

    A checkpoint's tensor is drawn whole and by its name, so that ranks hold their shares of one model.
    """
    for source in sources:
        if "norm" in source.name:  # as every family calls them
            source.target.fill_(0.0 if source.name.endswith(".bias") else 1.0)
            continue
        generator = torch.Generator(source.target.device).manual_seed(
            zlib.crc32(source.name.encode(), seed % (1 << 32))
        )
        dtype = source.target.dtype if source.scale is None else torch.bfloat16  # no numbers are drawn in float8
        noise = torch.empty(source.shape, dtype=dtype, device=source.target.device)
        source.fill(noise.normal_(0.0, DUMMY_STD, generator=generator)[source.region])
