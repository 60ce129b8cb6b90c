from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from weft_backend import __main__ as cli
from weft_backend.config import BUILTIN_MODEL, BackendConfig, EngineConfig
from weft_backend.errors import EngineDied, StartupError


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[..., BackendConfig]:
    """Parses a command line into the configuration that would be served."""

    def run(*args: str) -> BackendConfig:
        configs: list[BackendConfig] = []

        async def serve(config: BackendConfig) -> None:
            configs.append(config)

        monkeypatch.setattr(cli, "serve", serve)
        result = CliRunner().invoke(cli.main, args, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return configs[0]

    return run


def test_json_round_trip() -> None:
    config = EngineConfig(model="m", num_pages=3, gpu_memory_utilization=0.5, seed=2**62)
    assert EngineConfig.from_json(config.to_json()) == config


def test_defaults_of_the_command_line_are_those_of_the_dataclasses(parse: Callable[..., BackendConfig]) -> None:
    assert parse() == BackendConfig(metrics_address=("127.0.0.1", 9400))


def test_builtin_model_is_the_default(parse: Callable[..., BackendConfig]) -> None:
    engine = parse().engine
    assert (engine.model, engine.served_model_name) == (str(BUILTIN_MODEL), "weft-tiny")


def test_the_builtin_model_has_a_name(
    parse: Callable[..., BackendConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("weft-tiny") == parse()
    assert parse("weft-tiny", "--served-model-name", "alias").engine.served_model_name == "alias"
    (tmp_path / "weft-tiny").mkdir()
    assert parse("weft-tiny").engine.model == "weft-tiny", "a folder of that name wins"


def test_types_have_short_names(parse: Callable[..., BackendConfig]) -> None:
    assert [parse("--dtype", name).engine.dtype for name in ("half", "float")] == ["float16", "float32"]


@pytest.mark.parametrize(("model", "name"), [("org/some-model", "some-model"), ("/models/local/", "local")])
def test_served_name_is_the_last_part_of_the_model(parse: Callable[..., BackendConfig], model: str, name: str) -> None:
    assert parse(model).engine.served_model_name == name
    assert parse(model, "--served-model-name", "alias").engine.served_model_name == "alias"


def test_every_engine_field_has_a_flag(parse: Callable[..., BackendConfig]) -> None:
    flags = {parameter.name for parameter in cli.main.params}
    assert {field.name for field in dataclasses.fields(EngineConfig)} <= flags


def test_listen_replaces_host_and_port(parse: Callable[..., BackendConfig]) -> None:
    assert parse("--listen", "unix:/tmp/w.sock", "--metrics-port", "0") == BackendConfig(address="unix:/tmp/w.sock")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--trust-remote-code"], "never executed"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size 0: must be in [1, 64]"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization 1.5: must be in (0, 1]"),
        (["--gpu-memory-utilization", "nan"], "--gpu-memory-utilization nan: must be in (0, 1]"),
        (["--block-size", "0"], "--block-size 0: must be a power of two"),
        (["--block-size", "24"], "--block-size 24: must be a power of two"),
        (["--num-pages", "0"], "--num-pages 0: must be in [1, 2147483647]"),
        (["--max-num-seqs", "0"], "--max-num-seqs 0: must be in [1, 65536]"),
        (["--max-queued-tokens", "0"], "--max-queued-tokens 0: must be in [1, 2147483647]"),
        (["--max-num-seqs", "100000"], "--max-num-seqs 100000: must be in [1, 65536]"),
        (["--num-pages", "99999999999999999999"], "--num-pages 99999999999999999999: must be in [1, 2147483647]"),
        (["--served-model-name", ""], "--served-model-name : must be a name, not empty"),
        (["--swap-space", "-1"], "--swap-space -1.0: must be at least 0 GiB"),
        (["--swap-space", "inf"], "--swap-space inf: must be at least 0 GiB"),
        (["--swap-space", "999999"], "GiB, which is this machine's memory per GPU"),
        (["--enable-chunked-prefill"], "--enable-chunked-prefill is not needed"),
        (["--disable-log-requests"], "--disable-log-requests is not needed"),
        (["--disable-log-stats"], "--disable-log-stats is not needed"),
        (["--model", "x"], "the model is given without one"),
        (["--model=x"], "the model is given without one"),
        (["--enable-auto-tool-choice"], "--enable-auto-tool-choice is not offered"),
        (["-tp", "2"], "-tp is called --tensor-parallel-size"),
        (["--max-seqs", "3"], "No such option '--max-seqs'. Did you mean '--max-num-seqs'?"),
        (["--no-enable-prefix-cache"], "Did you mean '--no-enable-prefix-caching'?"),
        (["--seed", str(1 << 63)], "--seed 9223372036854775808: must be a signed number of 64 bits"),
        (["--drain-timeout", "-1"], "--drain-timeout -1.0: must be at least 0 s"),
        (["--watchdog-timeout", "0"], "--watchdog-timeout 0.0: must be more than 0 s"),
        (["--metrics-port", "70000"], "--metrics-port 70000: must be a port, below 65536"),
        (["--max-num-seqs", "100", "--max-num-batched-tokens", "64"], "below --max-num-seqs 100"),
        (["--dtype", "int4"], "--dtype"),
    ],
)
def test_bad_flags_are_refused_in_a_sentence(args: list[str], says: str) -> None:
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code != 0
    assert says in result.output
    assert "Traceback" not in result.output


@pytest.mark.parametrize("flag", ["--bad", "--data-parallel-size", "--pipeline-parallel-size", "--no-enable-lora"])
def test_only_what_is_close_is_suggested(flag: str) -> None:
    result = CliRunner().invoke(cli.main, [flag, "2"])
    assert result.output.endswith(f"Error: No such option '{flag}'.\n")


def test_swap_space_is_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 8 << 18, "SC_PAGE_SIZE": 4096}.get)
    assert EngineConfig(swap_space=4.0, tensor_parallel_size=2).swap_space == 4
    with pytest.raises(StartupError, match=r"--swap-space 5.0: must be at least 0 GiB, and at most 4.0 GiB"):
        EngineConfig(swap_space=5.0, tensor_parallel_size=2)


@pytest.mark.parametrize("error", [StartupError("no room (--num-pages)"), EngineDied("it was killed")])
def test_a_failure_ends_with_one_line_and_a_status(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    async def serve(config: BackendConfig) -> None:
        raise error

    monkeypatch.setattr(cli, "serve", serve)
    result = CliRunner().invoke(cli.main, [])
    assert result.exit_code == 1
    assert result.output == f"weft: {error}\n"


def test_help_is_complete_and_short() -> None:
    result = CliRunner().invoke(cli.main, ["--help"], terminal_width=120)
    assert len(result.output.splitlines()) < 45
    options = re.findall(r"^ +(?:-h, )?(--[a-z-]+)", result.output, re.MULTILINE)
    assert len(options) == len(cli.main.params)  # without MODEL, with --help


def test_the_io_process_imports_no_torch() -> None:
    code = "import sys, weft_backend.__main__; sys.exit(bool({'torch', 'transformers', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
