from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from weft_backend.checkpoint import CheckpointError, model_hash, resolve_checkpoint, weight_files
from weft_backend.config_fields import ConfigError
from weft_backend.errors import StartupError
from weft_backend.layers import TensorParallel, VocabParallelEmbedding
from weft_backend.model_config import load_model_config
from weft_backend.models import Model, load_model
from weft_backend.weights import load_weights

CPU = torch.device("cpu")
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path, dtype: str = "auto") -> Model:
    return load_model(load_model_config(path, dtype=dtype), path, device=CPU)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "llama", tokenizer=False)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return make_checkpoint("llama", tmp_path / "sharded", num_shards=3, tokenizer=False)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_fused_parameters_are_the_parts_side_by_side(llama: Path) -> None:
    stored = load_file(llama / "model.safetensors")
    parameters = dict(load(llama).named_parameters())
    layer = "model.layers.2"
    qkv = torch.cat([stored[f"{layer}.self_attn.{name}_proj.weight"] for name in "qkv"])
    gate_up = torch.cat([stored[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    assert torch.equal(parameters["decoder.layers.2.self_attn.qkv_proj.weight"], qkv)
    assert torch.equal(parameters["decoder.layers.2.mlp.gate_up_proj.weight"], gate_up)
    assert sum(p.numel() for p in parameters.values()) == sum(t.numel() for t in stored.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_take_the_type_asked_for(dtype: str, llama: Path) -> None:
    assert {p.dtype for p in load(llama, dtype=dtype).parameters()} == {getattr(torch, dtype)}
    assert torch.get_default_dtype() == torch.float32


def test_a_missing_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop(Q_PROJ))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors lacks {Q_PROJ} \(1 of 30 "):
        load(llama)


def test_a_missing_tensor_of_a_sharded_checkpoint(sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    file = sharded / index["weight_map"][Q_PROJ]
    tensors = load_file(file)
    del tensors[Q_PROJ]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=rf"none of \d weight files has {Q_PROJ}"):
        load(sharded)


def test_an_untied_head_must_be_there(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        load(llama)


def test_an_unknown_tensor(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({"model.layers.3.self_attn.q_proj.weight": torch.ones(64, 64)}))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: model\.layers\.3\.self_attn\.q_proj\.weight is no"):
        load(llama)


def test_harmless_extras(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3", tmp_path / "qwen3", tokenizer=False)
    extras = {"lm_head.weight": torch.ones(384, 64), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    rewrite(path, lambda tensors: tensors.update(extras))
    model = load(path)
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, torch.ones(384, 64))


@pytest.mark.parametrize("shape", [(64, 32), (65, 64), (64,)])
def test_a_tensor_of_another_shape(shape: tuple[int, ...], llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({Q_PROJ: torch.ones(shape)}))
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} is .* but config\.json makes it \[64, 64\]"):
        load(llama)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_tensor_of_another_type(dtype: torch.dtype, llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 64).to(dtype)}))
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} is of type"):
        load(llama)


def test_values_that_are_not_finite(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors["lm_head.weight"][-1, -1].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has values that are not finite in float32"):
        load(llama)


def test_values_too_large_for_the_type(llama: Path) -> None:
    rewrite(llama, lambda tensors: tensors[Q_PROJ][3, 5].fill_(1e6))
    load(llama)
    with pytest.raises(CheckpointError, match=rf"{Q_PROJ} has values that are not finite in float16"):
        load(llama, dtype="float16")


@pytest.mark.parametrize("kept", [0, 5, 100, 0.5, -1])
def test_a_truncated_file(kept: float, llama: Path) -> None:
    file = llama / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept) if 0 < kept < 1 else int(kept)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load(llama)


def test_a_flipped_bit_of_the_header(llama: Path) -> None:
    file = llama / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[data.index(b"data_offsets") + 20] ^= 0x10
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load(llama)


def test_a_missing_shard(sharded: Path) -> None:
    lost = weight_files(sharded)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"{lost.name} is missing"):
        load(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": "../a.safetensors"}}'])
def test_a_damaged_index(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        load(sharded)


def test_pickles_are_not_read(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has no \*\.safetensors file"):
        load(llama)


def test_a_second_copy_of_the_weights_is_not_read(llama: Path) -> None:
    (llama / "consolidated.safetensors").write_bytes(b"another format")
    load(llama)


def test_dummy_weights_are_seeded_and_need_no_file(tmp_path: Path) -> None:
    path = make_checkpoint("opt", tmp_path / "opt", tokenizer=False)
    (path / "model.safetensors").unlink()
    config = load_model_config(path)
    first, again, other = (
        dict(load_model(config, path, device=CPU, load_format="dummy", seed=seed).named_parameters())
        for seed in (1, 1, 2)
    )
    name = "decoder.layers.0.fc1.weight"
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not torch.equal(first[name], other[name])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["decoder.final_layer_norm.weight"], torch.ones(64))


def test_an_unknown_load_format(llama: Path) -> None:
    with pytest.raises(ConfigError, match=r"^load_format: 'pt' is not one of auto, safetensors, dummy"):
        load_model(load_model_config(llama), llama, device=CPU, load_format="pt")


def test_heads_that_ranks_cannot_share(llama: Path) -> None:
    with pytest.raises(StartupError, match=r"^--tensor-parallel-size 4: does not divide num_key_value_heads, 2"):
        load_model(load_model_config(llama), llama, device=CPU, tp=TensorParallel(0, 4))


def test_ranks_beyond_the_end_of_the_vocabulary_hold_none_of_it(tmp_path: Path) -> None:
    stored = torch.arange(10.0).view(5, 2)
    save_file({"embed.weight": stored}, tmp_path / "model.safetensors")
    held = []
    for rank in range(4):
        embedding = VocabParallelEmbedding(5, 2, TensorParallel(rank, 4))
        load_weights(embedding.sources("embed"), tmp_path)
        held.append(embedding.weight)
    assert torch.equal(torch.cat(held)[:5], stored)


def test_resolve_a_folder(llama: Path, tmp_path: Path) -> None:
    assert resolve_checkpoint(str(llama)) == llama
    with pytest.raises(CheckpointError, match=r"--revision main: .* is a local folder"):
        resolve_checkpoint(str(llama), revision="main")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        resolve_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such folder, and not a hub id"):
        resolve_checkpoint(str(tmp_path / "nothing"))


def test_resolve_a_hub_id(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    calls: list[dict[str, object]] = []

    def download(repo_id: str, **options: object) -> str:
        calls.append({"repo_id": repo_id} | options)
        return str(llama)

    monkeypatch.setattr("weft_backend.checkpoint.snapshot_download", download)
    assert resolve_checkpoint("org/name", revision="v2", download_dir="/models") == llama
    resolve_checkpoint("org/name", weights=False)
    patterns = [set(str(call["allow_patterns"]).split("'")) for call in calls]
    assert calls[0]["repo_id"] == "org/name"
    assert (calls[0]["revision"], calls[0]["cache_dir"]) == ("v2", "/models")
    assert "*.safetensors" in patterns[0]
    assert "*.safetensors" not in patterns[1]
    assert not any(pattern.endswith((".py", ".bin", ".pt")) for pattern in patterns[0])


def test_model_hash(llama: Path, tmp_path: Path) -> None:
    same = make_checkpoint("llama", tmp_path / "same", tokenizer=False)
    larger = make_checkpoint("llama", tmp_path / "larger", tokenizer=False, intermediate_size=144)
    assert model_hash(llama) == model_hash(same)
    assert len(model_hash(llama)) == 64
    assert model_hash(llama) != model_hash(larger)
