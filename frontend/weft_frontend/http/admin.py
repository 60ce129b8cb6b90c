"""Everything but generation: models, probes, metrics, version, cache."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from weft.inference.v1 import inference_pb2 as pb
from weft_frontend.errors import Unavailable
from weft_frontend.http.call import Call, answer


def _model(model: pb.Model) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "weft",
        "max_model_len": model.max_model_len,
    }


async def list_models(call: Call) -> None:
    """`GET /v1/models`."""
    models = call.services.generation.list_models().models
    await call.answer({"object": "list", "data": [_model(model) for model in models]})


async def get_model(call: Call) -> None:
    """`GET /v1/models/{id}`."""
    await call.answer(_model(await call.services.generation.get_model(call.scope["path_params"]["model"])))


async def health(call: Call) -> None:
    """`GET /health`: this process answers."""
    await call.answer({"status": "ok"})


async def ready(call: Call) -> None:
    """`GET /ready`: a model can be used, and the process is not draining."""
    if not call.services.ready():
        generation = call.services.generation
        why = "this frontend is draining" if generation.ready else generation.why_not_ready
        raise Unavailable(why, reason="NOT_READY", retry_after_ms=1000)
    await call.answer({"status": "ready"})


async def metrics(call: Call) -> None:
    """`GET /metrics`, in Prometheus' text format."""
    body, content_type = call.services.metrics.exposition()
    await answer(call.send, call.request_id, 200, body, content_type.encode())


async def get_version(call: Call) -> None:
    """`GET /version`."""
    await call.answer({"version": version("weft")})


async def reset_prefix_cache(call: Call) -> None:
    """`POST /reset_prefix_cache`: forget cached prefixes on every backend."""
    await call.answer({"num_pages": await call.services.generation.reset_prefix_cache()})
