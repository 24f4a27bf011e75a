"""The wheel takes along every package and the topologies."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    inits = (ROOT / "tpinfer").rglob("__init__.py")
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in inits}
    assert packages <= set(settings["packages"])
    for package, folder in settings["package-dir"].items():
        patterns = settings["package-data"][package]
        assert any(list((ROOT / folder).glob(pattern)) for pattern in patterns), package
