"""The top layer: values of a topology file changed from the command line (`--set PATH=VALUE`).

A path names keys and places in lists: `hosts.box.links.0.bw=16GB/s`, `placement.tp=4`. The longest
key that fits comes first, so keys with dots in them (`h0..h3`) can be named.
"""

from collections.abc import Sequence

import yaml

from tpinfer.config.errors import TopologyError
from tpinfer.config.strict_yaml import SET_FLAG, Entry


def with_settings(document: Entry, settings: Sequence[str]) -> tuple[Entry, tuple[str, ...]]:
    """(the document with `settings` in it, their paths). The document itself is changed.

    Raises TopologyError for a path that leads nowhere and a value that is not YAML.
    """
    paths = []
    for setting in settings:
        path, equals, value = setting.partition("=")
        if not equals or not path or not value:
            raise TopologyError(
                f"{SET_FLAG} {setting}: write PATH=VALUE, such as hosts.box.links.0.bw=16GB/s"
            )
        _put(document.node, path, _value(setting, value), setting)
        paths.append(path)
    return document, tuple(paths)


def _value(setting: str, text: str) -> yaml.Node:
    try:
        loader = yaml.SafeLoader(text)
        loader.name = SET_FLAG
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        raise TopologyError(f"{SET_FLAG} {setting}: {text!r} is not YAML ({error})") from None
    if node is None:
        raise TopologyError(f"{SET_FLAG} {setting}: the value is empty; give one")
    return node


def _put(node: yaml.Node, path: str, value: yaml.Node, setting: str) -> None:
    """Put `value` at `path` below `node`; the last key may be a new one."""
    if isinstance(node, yaml.SequenceNode):
        place, _, rest = path.partition(".")
        if not place.isdecimal() or int(place) >= len(node.value):
            raise _nowhere(setting, place, [str(i) for i in range(len(node.value))])
        if rest:
            _put(node.value[int(place)], rest, value, setting)
        else:
            node.value[int(place)] = value
        return
    if not isinstance(node, yaml.MappingNode):
        raise _nowhere(setting, path, [])
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    fitting = [key for key in keys if path == key or path.startswith(f"{key}.")]
    if not fitting:
        if "." in path:
            raise _nowhere(setting, path, keys)
        new_key = yaml.ScalarNode("tag:yaml.org,2002:str", path, value.start_mark, value.end_mark)
        node.value.append((new_key, value))
        return
    key = max(fitting, key=len)
    place = keys.index(key)
    if path == key:
        node.value[place] = (node.value[place][0], value)
    else:
        _put(node.value[place][1], path[len(key) + 1 :], value, setting)


def _nowhere(setting: str, part: str, known: list[str]) -> TopologyError:
    there = f"known there are {', '.join(known)}" if known else "it is a single value"
    return TopologyError(f"{SET_FLAG} {setting}: nothing is called {part!r}; {there}")
