"""How the suite is split and what it needs: one xdist group for multi-rank tests, GPU tests skipped
without one.

Torch-free, so that `tests/pure` stays so.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

REPOSITORY = Path(__file__).resolve().parents[1]
_counter = itertools.count()

settings.register_profile("tpinfer", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("tpinfer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start ranks (marker `ranks`) share one xdist group: two at once would fight for
    the cores.
    """
    no_gpu = pytest.mark.skip(reason="no GPU on this machine (/dev/nvidia0 is missing)")
    has_gpu = Path("/dev/nvidia0").exists()
    for item in items:
        if item.get_closest_marker("ranks") is not None:
            item.add_marker(pytest.mark.xdist_group("ranks"))
        if item.get_closest_marker("gpu") is not None and not has_gpu:
            item.add_marker(no_gpu)


@pytest.fixture
def run_name() -> Iterator[str]:
    """A name no other test or run has, for segments and run ids; nothing with it may stay in
    /dev/shm.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    name = f"test-{worker}-{os.getpid()}-{next(_counter)}"
    yield name
    left = sorted(path.name for path in Path("/dev/shm").glob(f"tpinfer*{name}*"))
    for path in left:
        Path("/dev/shm", path).unlink()
    assert not left, f"left in /dev/shm: {left}"


@pytest.fixture
def python_path(tmp_path: Path) -> str:
    """PYTHONPATH for a child process that imports tpinfer and modules the test writes to
    `tmp_path`.
    """
    return os.pathsep.join([str(tmp_path), str(REPOSITORY)])
