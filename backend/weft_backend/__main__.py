"""``python -m weft_backend [MODEL]``: the command line of a backend."""

from __future__ import annotations

import asyncio
import difflib
import logging
import sys
from pathlib import Path

import click

from weft_backend.config import BUILTIN_MODEL, BUILTIN_MODEL_NAME, BackendConfig, EngineConfig
from weft_backend.errors import EngineDied, StartupError
from weft_backend.server import serve

# What is asked of other engines by a flag.
_ANSWERS = {
    "--trust-remote-code": "is not needed and not supported: every model is implemented in this package, "
    "and code from a checkpoint is never executed",
    "--enable-chunked-prefill": "is not needed: long prompts are always read in chunks",
    "--disable-log-requests": "is not needed: requests are never logged",
    "--disable-log-stats": "is not needed: statistics are never logged, they are at /metrics",
    "--model": "is not a flag here: the model is given without one, before or after the flags",
    "-tp": "is called --tensor-parallel-size",
    **dict.fromkeys(
        ("--enable-auto-tool-choice", "--tool-call-parser"), "is not offered: tool calls are not parsed out of answers"
    ),
}
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}
_CLOSE = 0.82  # --max-seqs is 0.83 from --max-num-seqs; --data-parallel-size is 0.81 from --tensor-parallel-size


class _Command(click.Command):
    """Answers flags that it does not have."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for flag in (argument.partition("=")[0] for argument in args):
            if flag in _ANSWERS:
                raise click.UsageError(f"{flag} {_ANSWERS[flag]}", ctx)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = [flag for option in self.params for flag in (*option.opts, *option.secondary_opts)]
            close = difflib.get_close_matches(error.option_name, flags, n=1, cutoff=_CLOSE)
            raise click.NoSuchOption(error.option_name, possibilities=close, ctx=ctx) from None
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # with it the usage is shown, by which weft.services knows these errors
            raise


@click.command(
    cls=_Command,
    context_settings={"show_default": True, "max_content_width": 120, "help_option_names": ["-h", "--help"]},
)
@click.argument("model", default="")
@click.option("--served-model-name", help="Name clients use for the model.  [default: last part of MODEL]")
@click.option("--host", default="127.0.0.1", help="Address to bind. There is no authentication: think before 0.0.0.0.")
@click.option("--port", default=50052, help="gRPC port.")
@click.option("--listen", metavar="unix:/PATH", help="Bind a Unix socket instead of a port.")
@click.option("--metrics-port", default=9400, help="HTTP port of /metrics; 0: none.")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16", "float16", *_DTYPE_ALIASES]),
              callback=lambda context, option, name: _DTYPE_ALIASES.get(name, name))  # fmt: skip
@click.option("--quantization", type=click.Choice(["fp8"]), help="Store the layers' weights in 8 bits.")
@click.option(
    "--kv-cache-dtype", default="auto", type=click.Choice(["auto", "fp8", "fp8_e4m3"]), help="auto: the model's."
)
@click.option("--device", default="auto", type=click.Choice(["auto", "cuda", "cpu"]))
@click.option(
    "--max-model-len",
    type=int,
    help="Prompt and output tokens, at most.  [default: what the model can and memory holds]",
)
@click.option(
    "--load-format", default="auto", type=click.Choice(["auto", "safetensors", "dummy"]), help="dummy: random weights."
)
@click.option("--revision", help="Branch, tag or commit on the hub.")
@click.option("--download-dir", help="Folder for downloads.  [default: the hub's cache]")
@click.option("--block-size", default=64, help="Tokens per page of the KV cache, a power of two.")
@click.option("--num-pages", type=int, help="Pages of the KV cache.  [default: what memory holds]")
@click.option("--gpu-memory-utilization", default=0.9, help="Share of the GPU's memory to use.")
@click.option("--swap-space", default=0.0, help="GiB of host memory for cached prefixes, per GPU.")
@click.option("--max-num-seqs", default=256, help="Sequences that run at once.")
@click.option("--max-num-batched-tokens", default=8192, help="Tokens per step.")
@click.option(
    "--max-queued-tokens", type=int, help="Prompt tokens that may wait before requests are refused.  [default: 2097152]"
)
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, help="Keep the KV cache of prompts.")
@click.option("--enforce-eager", is_flag=True, help="Use no CUDA graphs.")
@click.option("--seed", type=int, help="Seed of requests that name none, and of dummy weights.  [default: drawn; 0]")
@click.option("--tensor-parallel-size", default=1, help="GPUs that share the model.")
@click.option("--require-tokenizer", is_flag=True, help="End if the model has none: it would serve token ids alone.")
@click.option("--drain-timeout", default=30.0, help="Seconds that running requests get at SIGTERM.")
@click.option("--watchdog-timeout", default=60.0, help="Seconds without a step after which the engine is ended.")
def main(
    model: str,
    served_model_name: str | None,
    host: str,
    port: int,
    listen: str | None,
    metrics_port: int,
    drain_timeout: float,
    watchdog_timeout: float,
    **engine: object,
) -> None:
    """Serve MODEL, a folder or a Hugging Face id, over gRPC (weft.engine.v1).

    Without MODEL it is the built-in weft-tiny, which can be named so, too.
    """
    if not model or (model == BUILTIN_MODEL_NAME and not Path(model).is_dir()):
        model, default_name = str(BUILTIN_MODEL), BUILTIN_MODEL_NAME
    else:
        default_name = Path(model).name
    name = default_name if served_model_name is None else served_model_name
    logging.basicConfig(level=logging.WARNING, format="weft: %(message)s")
    try:
        config = BackendConfig(
            engine=EngineConfig(model=model, served_model_name=name, **engine),  # type: ignore[arg-type]
            address=listen or f"{host}:{port}",
            metrics_address=(host, metrics_port) if metrics_port else None,
            drain_timeout=drain_timeout,
            watchdog_timeout=watchdog_timeout,
        )
        asyncio.run(serve(config))
    except (StartupError, EngineDied) as error:
        sys.exit(f"weft: {error}")


if __name__ == "__main__":
    main(prog_name="weft backend")
