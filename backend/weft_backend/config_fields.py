"""The fields of a JSON configuration file, each read with a check of its type and range."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weft_backend.errors import StartupError


class ConfigError(StartupError):
    """A field of config.json, or an option that overrides it, cannot be served; ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class Fields:
    """The fields of one JSON object, each checked for its type; an absent field and null are the same."""

    def __init__(self, raw: dict[str, Any], prefix: str = "") -> None:
        self._raw = raw
        self.prefix = prefix

    @classmethod
    def read(cls, path: Path) -> Fields:
        """The object in the file at ``path``; raises ConfigError by the file's name."""
        try:
            raw = json.loads(path.read_bytes())
        except OSError as error:
            raise ConfigError(path.name, f"cannot be read from {path.parent}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(path.name, f"in {path.parent} is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ConfigError(path.name, f"in {path.parent} is not a JSON object")
        return cls(raw)

    def has(self, name: str) -> bool:
        return self._raw.get(name) is not None

    def _get(self, name: str, kind: type[Any], default: Any) -> Any:
        value = self._raw.get(name)
        if value is None:
            if default is None:
                raise ConfigError(self.prefix + name, "is missing from config.json")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConfigError(self.prefix + name, f"must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def count(self, name: str, default: int | None = None, *, minimum: int = 1) -> int:
        """A number of things; without a default it must be there, as in the methods below."""
        value = int(self._get(name, int, default))
        if value < minimum:
            raise ConfigError(self.prefix + name, f"must be at least {minimum}, not {value}")
        return value

    def number(self, name: str, default: float | None = None, *, positive: bool = True) -> float:
        """A finite number, not negative; unless ``positive`` is False, not 0 either."""
        value = float(self._get(name, float, default))
        if not 0 <= value < float("inf") or (positive and value == 0):
            raise ConfigError(self.prefix + name, f"must be {'positive' if positive else 'at least 0'}, not {value}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._get(name, bool, default))

    def text(self, name: str, default: str | None = None) -> str:
        return str(self._get(name, str, default))

    def texts(self, name: str) -> list[str]:
        """Texts, as a list."""
        return [str(value) for value in self._get(name, list, None)]

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids, given as one, as a list, or not at all."""
        value = self._raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(i) is not int or i < 0 for i in ids):
            raise ConfigError(self.prefix + name, "must be a token id or a list of them")
        return tuple(ids)

    def object(self, name: str) -> Fields:
        return Fields(self._get(name, dict, {}), f"{self.prefix}{name}.")

    def require(self, name: str, wanted: Any) -> None:
        """Refuse a field that has another value than the only one we serve."""
        value = self._raw.get(name)
        if value is not None and value != wanted:
            raise ConfigError(self.prefix + name, f"{value!r} is not supported, only {wanted!r} is")
