"""What a user may call a model: a directory, a hub id that is in the local cache, a model that
ships with the package, or `shape:NAME` for random weights of a well-known shape."""

from pathlib import Path

from tpinfer.config.errors import ConfigError
from tpinfer.config.huggingface import find_model_directory
from tpinfer.embedded.locate import MODELS, embedded_model, shape_directory, shape_names

SHAPE_PREFIX = "shape:"


def is_shape(name: str) -> bool:
    """Whether the name asks for random weights."""
    return name.startswith(SHAPE_PREFIX)


def model_directory(name: str) -> Path:
    """Directory of what the name means. Never downloads. Raises ConfigError."""
    try:
        if is_shape(name):
            return shape_directory(name.removeprefix(SHAPE_PREFIX))
        if name in MODELS:
            return embedded_model(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return find_model_directory(name)


def shape_or_model_directory(name: str) -> Path:
    """The same for those who need no weights: a shape's name may stand without its prefix, unless
    there is a directory of that name. Raises ConfigError."""
    if name in shape_names() and not Path(name).is_dir():
        return shape_directory(name)
    return model_directory(name)
