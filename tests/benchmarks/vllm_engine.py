"""Time vLLM by the load of ``weft bench engine``, with random weights and the same options.

    python -m benchmarks.vllm_engine SHAPE --json FILE [OPTIONS]

``compare_engines`` starts this, in an environment that has vLLM.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from typing import Any

import click

from weft.cli.engine_load import Request
from weft.cli.engine_options import LoadOptions, load_options
from weft.cli.options import FORWARDING

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


class VllmEngine:
    """vLLM as ``EngineLoad`` wants an engine."""

    def __init__(self, options: LoadOptions) -> None:
        import vllm  # type: ignore[import-not-found]

        self.name = f"vllm {vllm.__version__}"
        self.vocab_size: int = options.config["vocab_size"]
        self._vllm = vllm
        settings: dict[str, Any] = {"max_num_seqs": 256, "gpu_memory_utilization": 0.85, "enable_prefix_caching": False}
        settings |= {"load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": options.max_model_len}
        self._llm = vllm.LLM(model=str(options.shape), seed=0, **settings | keywords(options.arguments))

    def run(self, requests: Sequence[Request]) -> float:
        """Seconds that the requests take together."""
        prompts = [{"prompt_token_ids": request.prompt} for request in requests]
        sampling = [self._sampling(request) for request in requests]
        begin = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - begin
        counts = [len(output.outputs[0].token_ids) for output in outputs]
        if counts != [request.max_tokens for request in requests]:
            raise RuntimeError("requests gave another number of tokens than asked for")
        return seconds

    def _sampling(self, request: Request) -> Any:
        drawn = request.sampling
        return self._vllm.SamplingParams(
            temperature=drawn.temperature,
            top_p=drawn.top_p,
            top_k=drawn.top_k,
            max_tokens=request.max_tokens,
            ignore_eos=True,
            detokenize=False,
        )


def keywords(arguments: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of command-line ones: ``--block-size 32 --enforce-eager`` gives block_size 32, enforce_eager
    True.
    """
    found: dict[str, Any] = {}
    name = ""
    for argument in arguments:
        if argument.startswith("--"):
            name = argument[2:].replace("-", "_")
            found[name] = True
        else:
            found[name] = _value(argument)
    return found


def _value(argument: str) -> Any:
    try:
        return json.loads(argument)  # a number
    except json.JSONDecodeError:
        return argument


@click.command(context_settings=FORWARDING)
@load_options
def main(**load: Any) -> None:
    """Time vLLM on SHAPE. Engine options are keyword arguments of vllm.LLM, spelt as on a command line."""
    options = LoadOptions(**load)
    begin = time.perf_counter()
    engine = VllmEngine(options)
    options.measure(engine.name, engine, time.perf_counter() - begin)


if __name__ == "__main__":
    main()
