"""The wheel takes along every package, the topologies and the embedded models."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_is_listed():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    found = set()
    for folder in (ROOT, ROOT / "profiling"):
        for top in ("tpinfer", "tpprof"):
            inits = (folder / top).rglob("__init__.py")
            found |= {".".join(path.parent.relative_to(folder).parts) for path in inits}
    assert {"tpinfer.costs", "tpprof.readers"} <= found
    assert found | {"tpinfer.topologies"} == set(settings["packages"])


def test_the_files_that_travel_along_exist():
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)["tool"]["setuptools"]
    folders = settings["package-dir"]
    assert all((ROOT / folder).is_dir() for folder in folders.values())
    patterns = settings["package-data"]
    assert list((ROOT / folders["tpinfer.topologies"]).glob(patterns["tpinfer.topologies"][0]))
    assert list((ROOT / "tpinfer" / "embedded").glob("story/model.safetensors"))
    assert patterns["tpinfer.embedded"] == ["**/*"]
