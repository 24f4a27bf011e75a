"""The arrows of the house, read from every file's imports with `ast`; imports under TYPE_CHECKING
count too.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "tpinfer"

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
TORCH_FREE_FILES = {"engine/attribution.py", "machine/discover.py"}
"""Files of rooms above the torch line that need numpy at most."""
STRANGERS = [("decoding", "lora"), ("attention", "quantization"), ("collectives", "checkpoint")]
STRANGERS += [("server", "distill")]
"""Rooms that import each other in neither direction."""
ONLY_FROM = {"planner": {"cli"}, "worker": {"engine"}}
"""Who may import a room, where that is not everybody above it."""
NEEDS_RUN_EXTRA = {"torch", "numpy", "safetensors", "transformers", "triton"}
LIGHT_DEPENDENCIES = {"msgspec", "yaml"}
"""What `pip install tpinfer` brings along."""
FORBIDDEN_WORDS = set(
    ["data", "info", "ctx", "utils", "misc", "common", "helpers", "manager", "base", "core"]
)
MOST_LINES = 400


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
        parts = self.name.split(".")
        return parts[1] if parts[0] == "tpinfer" and len(parts) > 1 else ""


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
            if stem in ("tpinfer", "torch"):
                for alias in node.names:
                    yield Import(f"{stem}.{alias.name}", node.lineno, at_import)


def sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def place(path: Path) -> tuple[str, str, str]:
    """Path within the package, its room, and its dotted package."""
    inner = path.relative_to(PACKAGE)
    room = inner.parts[0] if len(inner.parts) > 1 else ""
    return inner.as_posix(), room, ".".join(("tpinfer", *inner.parts[:-1]))


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
    heavy = found.top in NEEDS_RUN_EXTRA
    if heavy and (torch_free or (inner in TORCH_FREE_FILES and found.top != "numpy")):
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


def statement_faults(inner: str, node: ast.AST) -> Iterator[str]:
    """What is wrong with one statement or expression, whatever it imports."""
    where = f"tpinfer/{inner}:{getattr(node, 'lineno', 0)}"
    if isinstance(node, ast.Global):
        yield f"{where}: global {', '.join(node.names)}"
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        text = f"{node.value.id}.{node.attr}"
        is_environment = re.fullmatch(r"os\.(environb?|getenvb?|putenv|unsetenv)", text)
        if is_environment and inner != "config/environment.py":
            yield f"{where}: {text} outside config/environment.py"
        if text == "torch.distributed" and not inner.startswith("collectives/"):
            yield f"{where}: torch.distributed outside collectives"
    if isinstance(node, ast.ImportFrom) and node.module == "os" and not inner.startswith("config/"):
        names = {alias.name for alias in node.names} & {"environ", "getenv", "putenv"}
        if names:
            yield f"{where}: from os import {', '.join(sorted(names))}"


def faults_of(path: Path) -> list[str]:
    inner, room, package = place(path)
    tree = parse(path)
    faults = [] if room in (*ORDER, "") else [f"tpinfer/{inner}: {room} is no room of the house"]
    for found in imports_of(tree, package):
        faults += arrow_faults(inner, room, found)
    for node in ast.walk(tree):
        faults += statement_faults(inner, node)
    return faults


def test_arrows_point_down() -> None:
    assert sources(), "nothing to check"
    assert [fault for path in sources() for fault in faults_of(path)] == []


def test_files_keep_their_size() -> None:
    lines = {place(path)[0]: len(path.read_text().splitlines()) for path in sources()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_names_say_what_things_are() -> None:
    paths = [path.relative_to(REPOSITORY) for path in sources()]
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
    nothing.
    """
    for path in sources():
        if path.name == "__init__.py":
            body = parse(path).body
            assert len(body) <= 1 and all(isinstance(node, ast.Expr) for node in body), path


def test_pure_tests_import_no_torch() -> None:
    for path in (REPOSITORY / "tests" / "pure").glob("*.py"):
        heavy = {found.name for found in imports_of(parse(path)) if found.top in NEEDS_RUN_EXTRA}
        assert heavy == set(), f"{path.name} imports {heavy}; move it to tests/cpu"


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
        ("costs/ops.py", "costs", "if TYPE_CHECKING:\n    import numpy", "below the torch line"),
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
    assert any(list(statement_faults("layers/l.py", node)) for node in ast.walk(ast.parse(text)))


def test_the_command_line_starts_without_heavy_imports() -> None:
    """A launcher must have started its ranks before a tenth of a second has gone."""
    code = "import sys, tpinfer.cli.main; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    heavy = NEEDS_RUN_EXTRA | {"tokenizers", "jinja2", "tpprof"}
    assert heavy & set(run.stdout.split()) == set()
