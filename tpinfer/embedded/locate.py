"""Where the models and shapes that ship with the package lie."""

from pathlib import Path

_HERE = Path(__file__).parent
MODELS = ("story", "story-draft")
"""Trained models: `story` writes short tales, `story-draft` is a smaller one of the same text."""


def embedded_model(name: str = "story") -> Path:
    """Directory of a trained model. Raises ValueError naming those that ship."""
    if name not in MODELS:
        raise ValueError(f"embedded model {name!r} does not exist; there are {', '.join(MODELS)}")
    return _HERE / name


def shape_names() -> tuple[str, ...]:
    """Shapes of well-known models, for runs with random weights."""
    return tuple(sorted(path.name for path in (_HERE / "shapes").iterdir() if path.is_dir()))


def shape_directory(name: str) -> Path:
    """Directory with only a config.json. Raises ValueError naming those that ship."""
    if name not in shape_names():
        raise ValueError(f"shape {name!r} does not exist; there are {', '.join(shape_names())}")
    return _HERE / "shapes" / name
