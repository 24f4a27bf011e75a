"""YAML read strictly: every value knows its file and line, unknown and repeated keys are errors.

Scalars stay text until somebody asks for a type, so `0..7` or `no` never become something else.
"""

import re
from collections.abc import Callable
from pathlib import Path

import yaml

from tpinfer.config import units
from tpinfer.config.errors import ConfigError, TopologyError

_RANGE = re.compile(r"(?P<stem>.*?)(?P<first>\d+)\.\.(?P=stem)?(?P<last>\d+)")
_MOST_IDS = 65536
SET_FLAG = "--set"
"""Name of the stream that values of `--set` come from."""


class Entry:
    """One value of a YAML file. Getters raise TopologyError naming file, line, key and remedy."""

    def __init__(self, node: yaml.Node, file: str, path: str) -> None:
        self._node = node
        self._file = file
        self.path = path

    def error(self, message: str) -> TopologyError:
        """An error at this value's place."""
        path = self.path or "the file"
        where = SET_FLAG if self.is_set else f"{self._file}, line {self._line}"
        return TopologyError(f"{where}: {path} {message}")

    @property
    def is_set(self) -> bool:
        """Whether `--set` gives this value, not the file."""
        return self._node.start_mark.name == SET_FLAG

    def text(self) -> str:
        """A scalar as written."""
        if not isinstance(self._node, yaml.ScalarNode) or not self._node.value:
            raise self.error("must be a single value")
        return self._node.value

    def choice(self, *allowed: str) -> str:
        """One of `allowed`."""
        if (text := self.text()) not in allowed:
            raise self.error(f"is {text!r}; use one of {', '.join(allowed)}")
        return text

    def count(self, least: int = 1) -> int:
        """A bare whole number."""
        text = self.text()
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise self.error(f"is {text!r}; it must be a whole number of {least} or more")
        return int(text)

    def ratio(self, zero: bool = False) -> float:
        """A bare number above 0, or 0 where `zero` is allowed."""
        text = self.text()
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (value == 0 and not zero):
            least = "0 or more" if zero else "above 0"
            raise self.error(f"is {text!r}; it must be a number {least} without a unit")
        return value

    def flag(self) -> bool:
        """true or false."""
        return self.choice("true", "false") == "true"

    def size(self) -> int:
        """Bytes."""
        return round(self._quantity(units.parse_size))

    def rate(self) -> float:
        """Bytes per second in one direction."""
        return self._quantity(units.parse_rate)

    def flops(self) -> float:
        """Operations per second."""
        return self._quantity(units.parse_flops)

    def time(self, zero: bool = False) -> float:
        """Seconds; 0 only where `zero` is allowed."""
        return self._quantity(lambda text: units.parse_time(text, zero))

    def signed_time(self) -> float:
        """Seconds, before or after 0."""
        text = self.text()
        if text.startswith("-"):
            return -self._quantity(lambda _: units.parse_time(text[1:], True))
        return self.time(zero=True)

    def price(self) -> float:
        """US dollars per hour."""
        return self._quantity(units.parse_price)

    def ids(self) -> tuple[str, ...]:
        """Ids as text: one, a range such as `0..7` or `h0..h3`, or a list of these."""
        found = (
            self._expand()
            if self.is_scalar
            else tuple(name for item in self.sequence() for name in item.ids())
        )
        if len(set(found)) != len(found):
            raise self.error("names an id twice; list each once")
        return found

    def sequence(self) -> list["Entry"]:
        """The items of a list."""
        if not isinstance(self._node, yaml.SequenceNode):
            raise self.error("must be a list")
        nodes = self._node.value
        return [Entry(node, self._file, f"{self.path}[{i}]") for i, node in enumerate(nodes)]

    def items(self) -> list["Entry"]:
        """The items of a list; anything else is its own only item."""
        return self.sequence() if isinstance(self._node, yaml.SequenceNode) else [self]

    @property
    def is_scalar(self) -> bool:
        """Whether this is a single value."""
        return isinstance(self._node, yaml.ScalarNode)

    def pairs(self) -> list[tuple["Entry", "Entry"]]:
        """(key, value) of a mapping with free keys, in order."""
        if not isinstance(self._node, yaml.MappingNode):
            raise self.error("must be a mapping in braces or indented `key: value` lines")
        prefix = f"{self.path}." if self.path else ""
        found: dict[str, tuple[Entry, Entry]] = {}
        for key_node, node in self._node.value:
            name = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            key = Entry(key_node, self._file, f"{prefix}{name}")
            if key.text() in found:
                raise key.error("is given twice; keep one")
            found[name] = (key, Entry(node, self._file, f"{prefix}{name}"))
        return list(found.values())

    def fields(self, *known: str) -> "Fields":
        """A mapping whose keys are all among `known`."""
        values = {}
        for key, value in self.pairs():
            if (name := key.text()) not in known:
                raise key.error(f"is not a known key; known here are {', '.join(known)}")
            values[name] = value
        return Fields(self, values)

    @property
    def _line(self) -> int:
        return self._node.start_mark.line + 1

    @property
    def node(self) -> yaml.Node:
        """What YAML made of it."""
        return self._node

    def _quantity(self, parse: Callable[[str], float]) -> float:
        try:
            return parse(self.text())
        except TopologyError:
            raise
        except ConfigError as error:
            raise self.error(f"is {error}") from None

    def _expand(self) -> tuple[str, ...]:
        text = self.text()
        if ".." not in text:
            return (text,)
        match = _RANGE.fullmatch(text)
        if match is None or int(match["first"]) > int(match["last"]):
            raise self.error(f"is {text!r}; write a rising range like 0..7 or h0..h3")
        first, last = int(match["first"]), int(match["last"])
        if last - first >= _MOST_IDS:
            raise self.error(f"is {text!r}, more than {_MOST_IDS} ids; shorten it")
        return tuple(f"{match['stem']}{i}" for i in range(first, last + 1))


class Fields:
    """The values of a mapping with known keys."""

    def __init__(self, entry: Entry, values: dict[str, Entry]) -> None:
        self.entry = entry
        self._values = values

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str) -> Entry | None:
        """The value of `key`, None where the file leaves it out."""
        return self._values.get(key)

    def need(self, key: str) -> Entry:
        """The value of `key`. Raises TopologyError where the file leaves it out."""
        if key not in self._values:
            raise self.entry.error(f"lacks the key {key!r}; add it")
        return self._values[key]


def quoted(value: str) -> str:
    """A scalar that reads back as `value`, in quotes where it needs them."""
    if re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_./+-]*[A-Za-z0-9_/+])?", value):
        return value
    return yaml.safe_dump(value, default_style='"', width=1 << 30, allow_unicode=True).rstrip("\n")


def read_yaml(path: Path) -> Entry:
    """The single document of a YAML file. Raises TopologyError for one that cannot be read."""
    return parse_yaml(read_text(path), path.name)


def read_text(path: Path) -> str:
    """A UTF-8 file. Raises TopologyError for one that cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path} cannot be read ({error}); check the path") from None


def parse_yaml(text: str, file: str) -> Entry:
    """The single document in `text`; `file` names it in errors. Raises TopologyError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise TopologyError(f"{file}{where}: not YAML ({error.problem}); fix it there") from None
    except yaml.YAMLError as error:
        raise TopologyError(f"{file}: not YAML ({error}); fix it") from None
    if node is None:
        raise TopologyError(f"{file} is empty; start it with `version: 1`")
    return Entry(node, file, "")
