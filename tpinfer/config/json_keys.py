"""Typed access to the keys of a JSON object, with errors that name file, key, value and remedy."""

import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from tpinfer.config.errors import ConfigError

_REQUIRED = object()


class JsonKeys:
    """A JSON object from `source`. A getter without default requires its key.

    `prefix` is the path of keys that led to the object; errors show it.
    """

    def __init__(self, values: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self._values = values
        self._source = source
        self._prefix = prefix

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def error(self, key: str, remedy: str) -> ConfigError:
        """An error about the value of `key`; `remedy` says what it must be or what to do."""
        value = self._values.get(key, _REQUIRED)
        found = "is missing" if value is _REQUIRED else f"is {json.dumps(value, default=str)}"
        return ConfigError(f"{self._source}: {self._prefix}{key} {found}; {remedy}")

    def raw(self, key: str, default: Any = None) -> Any:
        """The value as it stands; `default` where the key is absent."""
        return self._values.get(key, default)

    def count(self, key: str, default: Any = _REQUIRED, null: int | None = None) -> int:
        """A whole number of 1 or more; `default` where absent, `null` where null."""
        value = self._values.get(key, default)
        value = null if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.error(key, "it must be a whole number of 1 or more")
        return value

    def optional_count(self, key: str, default: int | None = None) -> int | None:
        """Like `count`, None where null."""
        if self._values.get(key, default) is None:
            return None
        return self.count(key, default)

    def number(self, key: str, default: Any = _REQUIRED, *, positive: bool = True) -> float:
        """A finite number; `default` where absent or null."""
        value = self._values.get(key)
        value = default if value is None else value
        valid = isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)
        if not valid or (positive and value <= 0):
            raise self.error(key, f"it must be a {'number above 0' if positive else 'number'}")
        return float(value)

    def optional_number(self, key: str, *, positive: bool = True) -> float | None:
        """Like `number`, None where absent or null."""
        return self.number(key, positive=positive) if key in self else None

    def flag(self, key: str, default: bool) -> bool:
        """true or false; `default` where absent or null."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.error(key, "it must be true or false")
        return value

    def token_ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id or a list of them; `default` where absent, none where null."""
        value = self._values.get(key, default)
        if value is None:
            return ()
        ids = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise self.error(key, "it must be a token id of 0 or more, or a list of them")
        return tuple(dict.fromkeys(ids))

    def nested(self, key: str) -> "JsonKeys | None":
        """The object under `key`; None where absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(key, "it must be an object in braces")
        return JsonKeys(value, self._source, f"{self._prefix}{key}.")


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError where there is no such file or object."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ConfigError(f"{path} is no file; give a checkpoint in Hugging Face's layout")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist; give a directory with a checkpoint in Hugging Face's layout"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); check the file") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{path}, line {error.lineno}: not JSON ({error.msg}); download the file again"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers too long, braces too deep
        raise ConfigError(f"{path}: not JSON ({error}); download the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds a {type(value).__name__}; it must hold an object in braces"
        )
    return value
