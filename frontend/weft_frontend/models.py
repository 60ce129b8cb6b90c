"""The models served now: which names there are, and what is behind each."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weft.engine.v1.model_pb2 import ModelCard
from weft_frontend.chat_template import ChatTemplate, choose_source
from weft_frontend.config import FrontendConfig
from weft_frontend.control_tokens import ControlTokens
from weft_frontend.engine_client import RETRY_AFTER_MS, BackendRefused, EngineClient
from weft_frontend.errors import InvalidRequest, NotFound, Unavailable
from weft_frontend.tokenizer import Tokenizer, TokenizerError

MAX_NAMES_TOLD = 8  # the details of a gRPC error have 8 KB

_PLAIN_NAME = re.compile(r"[A-Za-z0-9._/:-]{1,100}")  # shown to the client that made it up

UNSEEN_SECONDS = 0.8  # longer than MAX_BACKOFF_SECONDS and a session's opening, and within the second of a clear 503

logger = logging.getLogger("weft.frontend")


@dataclass(frozen=True, slots=True)
class TextHalf:
    """What a model's text needs: made once for each set of tokenizer files, however many backends serve them."""

    tokenizer: Tokenizer
    control_tokens: ControlTokens
    chat_template: ChatTemplate | None
    tool_template: ChatTemplate | None  # for conversations with tools

    def template(self, *, with_tools: bool) -> ChatTemplate:
        """Raises InvalidRequest if the model has none."""
        template = self.tool_template if with_tools else self.chat_template
        if template is None:
            message = "the model has no chat template; the operator can give one with --chat-template FILE"
            raise InvalidRequest(message, field="messages", reason="NO_CHAT_TEMPLATE")
        return template


@dataclass(slots=True)
class ServedModel:
    """A model, and the backends that serve it now or did before."""

    card: ModelCard
    text: TextHalf
    backends: list[EngineClient] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """A backend can take requests."""
        return any(backend.ready for backend in self.backends)


class ModelRegistry:
    """Holds the sessions to all backends, and knows the models by their public names."""

    def __init__(self, config: FrontendConfig) -> None:
        frontend_id = f"{socket.gethostname()}/{os.getpid()}"[:128]
        self.clients = [EngineClient(target, frontend_id, self._admit) for target in config.backends]
        self._public_names = dict(config.served_model_names)
        self._template_override = _checked_template(config.chat_template) if config.chat_template is not None else None
        self._models: dict[str, ServedModel] = {}  # by the name in the model card
        self._texts: dict[str, asyncio.Task[TextHalf]] = {}  # by tokenizer hash
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_idle(self) -> bool:
        """No request of this process is at a backend."""
        return not any(client.num_requests for client in self.clients)

    def start(self) -> None:
        """Begin to hold a session to each backend."""
        self._tasks = [asyncio.create_task(client.run()) for client in self.clients]
        self._tasks.append(asyncio.create_task(self._warn_of_missing_names()))

    async def close(self) -> None:
        """End all sessions."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ready_models(self) -> dict[str, ServedModel]:
        """The models that can be used now, by public name, in alphabetical order."""
        names = self._names()
        return {name: names[name] for name in sorted(names) if names[name].ready}

    def public_name(self, client: EngineClient) -> str:
        """The name under which a backend's model is served; empty if it is not known or not served."""
        for name, model in self._names().items():
            if client in model.backends:
                return name
        return ""

    async def find(self, name: str) -> tuple[str, ServedModel]:
        """The public name and model for the name in a request; an empty name means the only model.

        Waits a moment for backends never seen yet: a process that has just started is not to refuse what its
        neighbours on the same port accept.

        Raises:
            InvalidRequest: the name is left out, and there are several models.
            NotFound: there is no such model.
            Unavailable: no model to serve has been seen yet.
        """
        if not self._names() or (name and name not in self._names()):
            await self._wait_for_unseen()
        names = self._names()
        if not names:
            raise Unavailable(self.why_none, retry_after_ms=RETRY_AFTER_MS)
        if not name:
            if len(names) > 1:
                raise InvalidRequest(f"must be given: several models are served: {self._told_names()}", field="model")
            return next(iter(names.items()))
        if name not in names:
            asked = f'model "{name}"' if _PLAIN_NAME.fullmatch(name) else "such model"
            raise NotFound(f"there is no {asked} here; served: {self._told_names() or 'none'}", field="model")
        return name, names[name]

    @property
    def why_none(self) -> str:
        """Why no model can be used, if none can."""
        if not self._names() and all(client.was_ready.is_set() for client in self.clients):
            return f"no backend has {' or '.join(self._missing_names())}, which --served-model-name asks for"
        return "no backend is ready"

    def _told_names(self) -> str:
        names = list(self.ready_models())
        return ", ".join(names[:MAX_NAMES_TOLD]) + (", …" if len(names) > MAX_NAMES_TOLD else "")

    async def _wait_for_unseen(self) -> None:
        unseen = [client.was_ready.wait() for client in self.clients if not client.was_ready.is_set()]
        if unseen:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(UNSEEN_SECONDS):
                    await asyncio.gather(*unseen)

    def _missing_names(self) -> list[str]:
        """What --served-model-name asks for and no backend has had yet."""
        return sorted({own for own in self._public_names.values() if own not in self._models})

    async def _warn_of_missing_names(self) -> None:
        """Once every backend has been seen: until then, one of the others may have them."""
        await asyncio.gather(*(client.was_ready.wait() for client in self.clients))
        for name in self._missing_names():
            has = ", ".join(sorted(self._models))
            logger.warning("--served-model-name %s: no backend has a model of this name; they have %s", name, has)

    def _names(self) -> dict[str, ServedModel]:
        if not self._public_names:
            return self._models
        return {name: self._models[own] for name, own in self._public_names.items() if own in self._models}

    async def _admit(self, client: EngineClient, card: ModelCard) -> None:
        """Let a backend in, unless another one serves a different model under the same name."""
        for earlier in self._models.values():
            if client in earlier.backends:
                earlier.backends.remove(client)
        self._same_model(card)
        text = await self._text_half(client, card)
        model = self._same_model(card)  # again: another backend may have come in meanwhile
        if model is None:
            model = self._models[card.name] = ServedModel(card, text)
        model.backends.append(client)

    def _same_model(self, card: ModelCard) -> ServedModel | None:
        """The model that a backend with this card joins; None if it brings a new one."""
        model = self._models.get(card.name)
        if model is None or _identity(model.card) == _identity(card):
            return model
        if model.ready:
            raise BackendRefused(f"its {card.name} is not the {card.name} of the other backends: the hashes differ")
        return None

    async def _text_half(self, client: EngineClient, card: ModelCard) -> TextHalf:
        task = self._texts.get(card.tokenizer_hash)
        if task is None:
            task = asyncio.create_task(self._make_text_half(client))
            self._texts[card.tokenizer_hash] = task
        try:
            return await asyncio.shield(task)
        except TokenizerError as error:
            raise BackendRefused(str(error)) from error
        finally:
            if task.done() and (task.cancelled() or task.exception() is not None):
                self._texts.pop(card.tokenizer_hash, None)

    async def _make_text_half(self, client: EngineClient) -> TextHalf:
        files = await client.fetch_tokenizer()
        return await asyncio.to_thread(self._load_text_half, files)

    def _load_text_half(self, files: Mapping[str, bytes]) -> TextHalf:
        tokenizer = Tokenizer(files)

        def template(*, with_tools: bool) -> ChatTemplate | None:
            source = self._template_override or choose_source(files, with_tools=with_tools)
            return ChatTemplate(source, tokenizer.template_tokens) if source is not None else None

        return TextHalf(
            tokenizer,
            ControlTokens(tokenizer.special_tokens),
            template(with_tools=False),
            template(with_tools=True),
        )


def _checked_template(path: Path) -> str:
    """The template in a file. Raises ValueError, which names the file, if it is none."""
    try:
        source = path.read_text(encoding="utf-8")
        ChatTemplate(source, {})
    except ValueError as error:
        raise ValueError(f"--chat-template {path}: {error}") from error
    return source


def _identity(card: ModelCard) -> tuple[str, str]:
    return card.model_hash, card.tokenizer_hash
