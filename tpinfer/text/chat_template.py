"""Messages to a prompt, by the checkpoint's own jinja template, in a sandbox.

chat_template.jinja comes first, then tokenizer_config.json's `chat_template`. A template is a
stranger's program: it sees the messages and nothing else, cannot change them, and its errors are
reported as the checkpoint's.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tpinfer.config.errors import CheckpointError, ConfigError
from tpinfer.text.tokenizer import read_settings

Message = Mapping[str, Any]
"""{"role": ..., "content": ...}."""
MAX_TEMPLATE_CHARACTERS = 200_000
"""Longest template that is compiled."""


def find_template(directory: Path) -> str | None:
    """The checkpoint's chat template, None where it has none."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    found = read_settings(directory).get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default") or next(iter(named.values()), None)
    return found if isinstance(found, str) else None


class ChatTemplate:
    """A compiled template. Raises CheckpointError when it cannot be compiled."""

    def __init__(self, source: str, special_tokens: Mapping[str, str | None] | None = None) -> None:
        """special_tokens: what the template may refer to by name, such as bos_token."""
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            raise CheckpointError(
                f"the chat template has {len(source)} characters, more than "
                f"{MAX_TEMPLATE_CHARACTERS}; refused"
            )
        try:
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ConfigError(f"{error}; pip install 'tpinfer[run]'") from error
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens = {k: v for k, v in (special_tokens or {}).items() if v is not None}
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # constants are worked out here, by the template's own code
            raise CheckpointError(f"the chat template cannot be compiled ({error})") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt for `messages`. Raises ConfigError with the template's own words when it
        refuses them."""
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a stranger's program raises is its own
            raise ConfigError(f"the chat template refused the messages: {error}") from error


def _generation_tag() -> type:
    """`{% generation %}` marks what an assistant wrote, for training; here it changes nothing."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - jinja's own convention

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    return Generation


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> None:
    from jinja2.exceptions import TemplateError

    raise TemplateError(message)
