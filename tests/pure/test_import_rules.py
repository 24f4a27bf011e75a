"""The arrows of the house, read from every file's imports with `ast`; imports under TYPE_CHECKING
count too.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "tpinfer"
TPPROF = REPOSITORY / "profiling" / "tpprof"

ORDER = [
    "cli",
    "bench",
    "evaluation",
    "server",
    "engine",
    "worker",
    "decoding",
    "lora",
    "models",
    "layers",
    "attention",
    "quantization",
    "machine",
    "collectives",
    "checkpoint",
    "numerics",
    "launching",
    "text",
    "planner",
    "scheduling",
    "costs",
    "steps",
    "sharding",
    "config",
    "embedded",
]
"""A room imports only from rooms to its right."""
TORCH_FREE_ROOMS = set(ORDER[ORDER.index("launching") :])
TORCH_FREE_FILES = {
    "bench/datasets.py",
    "bench/workload.py",
    "engine/attribution.py",
    "engine/requests.py",
    "engine/run_report.py",
    "engine/timeline.py",
    "machine/clocks.py",
    "machine/discover.py",
    "machine/discover_topology.py",
    "machine/gpu_survey.py",
    "machine/hostfile.py",
    "machine/nics.py",
    "machine/nvml_driver.py",
    "machine/peers.py",
    "machine/topology_text.py",
}
"""Files of rooms above the torch line that need numpy at most."""
STRANGERS = [("decoding", "lora"), ("attention", "quantization"), ("collectives", "checkpoint")]
STRANGERS += [("server", "distill")]
"""Rooms that import each other in neither direction."""
ONLY_FROM = {"planner": {"cli"}, "worker": {"engine"}}
"""Who may import a room, where that is not everybody above it."""
TPPROF_ORDER = ["__main__", "cli", "report", "analyze", "attribute", "ranks", "classify"]
TPPROF_ORDER += ["rules", "readers", "intervals", "events", "results", "errors"]
"""Rooms of tpprof: folders, and files beside them. The same rule."""
TPPROF_KNOWS = {"config", "sharding", "costs"}
"""Rooms of tpinfer that tpprof may import."""
NEEDS_RUN_EXTRA = {"torch", "safetensors", "transformers", "triton"}
LIGHT_DEPENDENCIES = {"msgspec", "yaml", "numpy"}
"""What `pip install tpinfer` brings along."""
FORBIDDEN_WORDS = set(
    ["data", "info", "ctx", "utils", "misc", "common", "helpers", "manager", "base", "core"]
)
MOST_LINES, MOST_READER_LINES = 400, 500


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, the line, and whether it runs when the file is
    imported.
    """

    name: str
    line: int
    at_import: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    @property
    def room(self) -> str:
        """Room of tpinfer it belongs to, or nothing."""
        return self.room_in("tpinfer")

    def room_in(self, package: str) -> str:
        """Room of `package` it belongs to, or nothing."""
        parts = self.name.split(".")
        return parts[1] if parts[0] == package and len(parts) > 1 else ""


def imports_of(tree: ast.Module, package: str = "tpinfer") -> Iterator[Import]:
    """Every import statement anywhere in a file, relative ones made absolute within `package`."""
    inside = {
        id(node)
        for owner in ast.walk(tree)
        if isinstance(owner, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(owner)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_import)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level]
            named = [node.module] if node.module else []
            stem = ".".join((parents if node.level else []) + named)
            yield Import(stem, node.lineno, at_import)
            if stem in ("tpinfer", "tpprof", "torch"):
                for alias in node.names:
                    yield Import(f"{stem}.{alias.name}", node.lineno, at_import)


def sources(package: Path = PACKAGE) -> list[Path]:
    return sorted(package.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path) -> tuple[str, str, str]:
    """Path within the package, its room, and its dotted package."""
    inner = path.relative_to(PACKAGE)
    room = inner.parts[0] if len(inner.parts) > 1 else ""
    return inner.as_posix(), room, ".".join(("tpinfer", *inner.parts[:-1]))


def tpprof_place(path: Path) -> tuple[str, str, str]:
    """The same for tpprof, where a file beside the folders is a room of its own."""
    inner = path.relative_to(TPPROF)
    room = inner.with_suffix("").parts[0]
    package = ".".join(("tpprof", *inner.parts[:-1]))
    return inner.as_posix(), "" if room == "__init__" else room, package


def arrow_faults(inner: str, room: str, found: Import) -> Iterator[str]:
    """What is wrong with one import of one file."""
    where = f"tpinfer/{inner}:{found.line} imports {found.name}"
    if found.room in ORDER and room in ORDER and found.room != room:
        if ORDER.index(found.room) < ORDER.index(room):
            yield f"{where}: {found.room} stands above {room}"
        if (room, found.room) in STRANGERS or (found.room, room) in STRANGERS:
            yield f"{where}: {room} and {found.room} must not know each other"
        if room not in ONLY_FROM.get(found.room, {room}):
            yield f"{where}: only {', '.join(ONLY_FROM[found.room])} may"
    torch_free = room in TORCH_FREE_ROOMS
    if found.top in NEEDS_RUN_EXTRA and (torch_free or inner in TORCH_FREE_FILES):
        yield f"{where}: it stands below the torch line"
    allowed = LIGHT_DEPENDENCIES | {"tpinfer"} | set(sys.stdlib_module_names)
    if (torch_free or room in ("cli", "")) and found.at_import and found.top not in allowed:
        yield f"{where} when it is itself imported; `pip install tpinfer` does not bring it"
    if found.name.startswith("torch.distributed") and room != "collectives":
        yield f"{where}: only collectives may"
    if found.top == "tpprof" and room != "cli":
        yield f"{where}: only cli may"
    if found.top == "pickle":
        yield f"{where}: nothing here unpickles"


def tpprof_faults(inner: str, room: str, found: Import) -> Iterator[str]:
    """What is wrong with one import of one file of tpprof."""
    where = f"profiling/tpprof/{inner}:{found.line} imports {found.name}"
    target, order = found.room_in("tpprof"), TPPROF_ORDER
    if target in order and room in order and order.index(target) < order.index(room):
        yield f"{where}: {target} stands above {room}"
    if found.room not in TPPROF_KNOWS | {""}:
        yield f"{where}: of tpinfer it may know {', '.join(sorted(TPPROF_KNOWS))} alone"
    # `record` may run a program of the user's, or our own, that brings torch along.
    starts_programs = inner.startswith("cli/record") and not found.at_import
    allowed = LIGHT_DEPENDENCIES | {"tpinfer", "tpprof"} | set(sys.stdlib_module_names)
    if found.top not in allowed and not starts_programs:
        yield f"{where}: `pip install tpinfer` does not bring it"
    if found.top == "pickle":
        yield f"{where}: nothing here unpickles"


def statement_faults(path: str, node: ast.AST) -> Iterator[str]:
    """What is wrong with one statement or expression, whatever it imports."""
    where = f"{path}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Global):
        yield f"{where}: global {', '.join(node.names)}"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        text = f"{node.value.id}.{node.attr}"
        is_environment = re.fullmatch(r"os\.(environb?|getenvb?|putenv|unsetenv)", text)
        if is_environment and path != "tpinfer/config/environment.py":
            yield f"{where}: {text} outside config/environment.py"
        if text == "torch.distributed" and not path.startswith("tpinfer/collectives/"):
            yield f"{where}: torch.distributed outside collectives"
    if isinstance(node, ast.ImportFrom) and node.module == "os":
        names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
        if names and not path.startswith("tpinfer/config/"):
            yield f"{where}: from os import {', '.join(sorted(names))}"


def faults_of(path: Path) -> list[str]:
    """What is wrong with a file of tpinfer or of tpprof."""
    tree, shown = parse(path), path.relative_to(REPOSITORY).as_posix()
    is_tpprof = path.is_relative_to(TPPROF)
    inner, room, package = tpprof_place(path) if is_tpprof else place(path)
    rooms = TPPROF_ORDER if is_tpprof else ORDER
    faults = [] if room in (*rooms, "") else [f"{shown}: {room} is no room of the house"]
    for found in imports_of(tree, package):
        faults += (tpprof_faults if is_tpprof else arrow_faults)(inner, room, found)
    for node in ast.walk(tree):
        faults += statement_faults(shown, node)
    return faults


@pytest.mark.parametrize("package", [PACKAGE, TPPROF], ids=["tpinfer", "tpprof"])
def test_arrows_point_down(package: Path) -> None:
    assert sources(package), "nothing to check"
    assert [fault for path in sources(package) for fault in faults_of(path)] == []


def test_files_keep_their_size() -> None:
    too_long = {}
    for path in sources() + sources(TPPROF):
        reads_traces = path.is_relative_to(TPPROF / "readers")
        count = len(path.read_text().splitlines())
        if count > (MOST_READER_LINES if reads_traces else MOST_LINES):
            too_long[path.relative_to(REPOSITORY).as_posix()] = count
    assert too_long == {}


def test_names_say_what_things_are() -> None:
    paths = [path.relative_to(REPOSITORY) for path in sources() + sources(TPPROF)]
    paths += [path.relative_to(REPOSITORY) for path in (REPOSITORY / "launch").iterdir()]
    bad = [
        str(p)
        for p in paths
        for part in p.parts
        if set(Path(part).stem.split("_")) & FORBIDDEN_WORDS
    ]
    assert bad == []


def test_package_files_only_say_what_they_are_for() -> None:
    """An __init__.py holds at most a docstring: no re-exports, so that importing a room costs
    nothing. The package itself names the public API, which is imported when first asked for.
    """
    api = PACKAGE / "__init__.py"
    imports = [node for node in parse(api).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports if isinstance(node, ast.ImportFrom)] == ["typing"]
    for path in sources() + sources(TPPROF):
        if path.name == "__init__.py" and path != api:
            body = parse(path).body
            assert len(body) <= 1 and all(isinstance(node, ast.Expr) for node in body), path


def test_light_dependencies_are_the_declared_ones() -> None:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        declared = tomllib.load(file)["project"]["dependencies"]
    names = {re.split(r"[^a-z0-9]", line.lower())[0] for line in declared}
    assert {"yaml" if name == "pyyaml" else name for name in names} == LIGHT_DEPENDENCIES


def modules_behind(names: list[str]) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after importing `names`.

    One of ours that cannot be imported is passed over: its own tests say so better.
    """
    code = f"""
import importlib, sys
sys.path.insert(0, "profiling")
for name in {names}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("tpinfer", "tpprof", "tests"):
            raise
print(*sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_pure_tests_and_what_they_test_import_no_torch() -> None:
    paths = sorted((REPOSITORY / "tests" / "pure").glob("*.py"))
    loaded = modules_behind([f"tests.pure.{path.stem}" for path in paths])
    assert "hypothesis" in loaded
    assert NEEDS_RUN_EXTRA & loaded == set(), "move the test that needs it to tests/cpu"


def test_tpprof_imports_no_torch() -> None:
    """What `ast` cannot see: the modules behind those that tpprof imports."""
    found = [path.relative_to(TPPROF.parent).with_suffix("") for path in sources(TPPROF)]
    names = [".".join(path.parts) for path in found if path.stem not in ("__init__", "__main__")]
    loaded = modules_behind(names)
    assert "tpprof" in loaded and NEEDS_RUN_EXTRA & loaded == set()


@pytest.mark.parametrize(
    ("inner", "room", "text", "fault"),
    [
        (
            "costs/ops.py",
            "costs",
            "from tpinfer.models.decoder import x",
            "models stands above costs",
        ),
        ("costs/ops.py", "costs", "def f():\n    import torch", "below the torch line"),
        ("costs/ops.py", "costs", "if TYPE_CHECKING:\n    import torch", "below the torch line"),
        ("costs/ops.py", "costs", "import numpy", ""),
        ("costs/ops.py", "costs", "import pandas", "does not bring it"),
        ("text/t.py", "text", "import tokenizers", "does not bring it"),
        ("layers/l.py", "layers", "import torch.distributed as d", "only collectives may"),
        ("layers/l.py", "layers", "from torch import distributed", "only collectives may"),
        ("lora/a.py", "lora", "import tpinfer.models.decoder", ""),
        ("decoding/a.py", "decoding", "from tpinfer import lora", "must not know each other"),
        ("engine/e.py", "engine", "from tpinfer.planner.search import s", "only cli may"),
        ("engine/e.py", "engine", "from ..planner import search", "only cli may"),
        ("text/t.py", "text", "def f():\n    import tokenizers", ""),
        ("engine/e.py", "engine", "import pickle", "nothing here unpickles"),
    ],
)
def test_the_check_itself(inner: str, room: str, text: str, fault: str) -> None:
    found = [
        problem
        for one in imports_of(ast.parse(text), f"tpinfer.{room}")
        for problem in arrow_faults(inner, room, one)
    ]
    assert any(fault in problem for problem in found) if fault else found == []


@pytest.mark.parametrize(
    ("inner", "text", "fault"),
    [
        ("readers/r.py", "from tpprof.classify import c", "classify stands above readers"),
        ("ranks/r.py", "from tpprof.attribute.sweep import s", "attribute stands above ranks"),
        ("attribute/a.py", "from tpprof.ranks.match import m", ""),
        ("analyze.py", "from tpprof.report.text import t", "report stands above analyze"),
        ("report/t.py", "from tpprof.analyze import a", ""),
        ("results.py", "from tpprof import events", "events stands above results"),
        ("intervals.py", "from . import ranks", "ranks stands above intervals"),
        ("readers/r.py", "from ..events import Trace", ""),
        ("classify/c.py", "from tpinfer.costs.ops import x", ""),
        ("classify/c.py", "from tpinfer import engine", "of tpinfer it may know"),
        (
            "classify/c.py",
            "def f():\n    import tpinfer.engine.rank_engine",
            "of tpinfer it may know",
        ),
        ("cli/show.py", "def f():\n    import torch", "does not bring it"),
        ("cli/record.py", "def f():\n    import torch", ""),
        ("cli/record.py", "import torch", "does not bring it"),
        ("readers/r.py", "import pandas", "does not bring it"),
        ("readers/r.py", "import pickle", "nothing here unpickles"),
    ],
)
def test_the_check_of_tpprof(inner: str, text: str, fault: str) -> None:
    _, room, package = tpprof_place(TPPROF / inner)
    found = [
        problem
        for one in imports_of(ast.parse(text), package)
        for problem in tpprof_faults(inner, room, one)
    ]
    assert any(fault in problem for problem in found) if fault else found == []


@pytest.mark.parametrize(
    "text",
    [
        "global x",
        "os.environ['A']",
        "os.getenv('A')",
        "from os import environ",
        "torch.distributed",
    ],
)
def test_the_check_of_statements(text: str) -> None:
    assert any(
        list(statement_faults("tpinfer/layers/l.py", node)) for node in ast.walk(ast.parse(text))
    )


def test_the_command_line_starts_without_heavy_imports() -> None:
    """A launcher must have started its ranks before a tenth of a second has gone."""
    verbs = (PACKAGE / "cli").glob("*.py")
    light = {"attribution_table"}  # shown when a run is over
    names = [f"tpinfer.cli.{path.stem}" for path in verbs if path.stem not in light]
    assert "tpinfer.cli.main" in names
    loaded = modules_behind(names)
    heavy = NEEDS_RUN_EXTRA | {"tokenizers", "jinja2", "numpy", "tpprof"}
    assert "tpinfer" in loaded and heavy & loaded == set()
