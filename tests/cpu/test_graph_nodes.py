"""Kernels of a graph in the making, asked of a libcuda of our own; and the record that a run whose
steps are replayed writes beside its trace."""

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.cpu.recorded_ops import CallRecorder
from tests.cpu.test_graphs import SEAT, recorder, requests_of
from tpinfer.config.dtypes import DType
from tpinfer.config.engine import EngineConfig, RecordingRequest
from tpinfer.costs.graph_nodes import read_graph_nodes
from tpinfer.embedded.locate import embedded_model
from tpinfer.engine import rank_engine
from tpinfer.worker.graph_nodes import Driver, DriverError, NodeWatch

STREAM = 0x1234567890AB
KERNEL, COPY = 0, 1
assert recorder  # a fixture


class FakeCuda:
    """The library, and what is recorded in it."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.fake_clear()
        self._names: list[Any] = []  # the library keeps pointers

    def add(self, kind: int, name: str, *, is_kern: bool = False) -> None:
        self._names.append(ctypes.c_char_p(name.encode()))
        self._library.fake_add(kind, self._names[-1], int(is_kern))

    def fail(self, code: int) -> None:
        self._library.fake_fail(code)

    def launch_dependent(self) -> None:
        self._library.fake_dependent()


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so"
    source = Path(__file__).with_name("fake_libcuda.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def cuda(built: Path) -> Iterator[FakeCuda]:
    yield FakeCuda(built)


def test_kernels_between_marks(cuda: FakeCuda) -> None:
    watch = NodeWatch(Driver(cuda.path), STREAM)
    cuda.add(KERNEL, "feed")
    watch.mark()
    watch.mark()
    cuda.add(COPY, "")
    cuda.add(KERNEL, "_ZN2at6native12gather_namedEv", is_kern=True)
    cuda.launch_dependent()
    watch.mark()
    cuda.add(COPY, "")
    watch.mark()
    assert watch.parts() == [["feed"], [], ["gather_named"], []]


def test_a_call_that_fails_costs_the_record_alone(cuda: FakeCuda) -> None:
    watch = NodeWatch(Driver(cuda.path), STREAM)
    cuda.add(KERNEL, "one")
    watch.mark()
    cuda.fail(999)
    watch.mark()
    cuda.fail(0)
    watch.mark()
    assert watch.parts() is None
    with pytest.raises(DriverError, match="not being recorded"):
        Driver(cuda.path).nodes(STREAM + 1)


def test_a_driver_without_the_calls_is_none(tmp_path: Path) -> None:
    with pytest.raises(DriverError):
        Driver(str(tmp_path / "none.so"))
    source, old = tmp_path / "old.c", tmp_path / "old.so"
    source.write_text("int cuGraphGetNodes(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(old), str(source)], check=True)
    with pytest.raises(DriverError, match="cuStreamGetCaptureInfo_v3"):
        Driver(str(old))


def test_a_run_writes_which_op_each_kernel_is(recorder: CallRecorder, tmp_path: Path) -> None:
    config = EngineConfig(
        model_dir=embedded_model(), dtype=DType.FLOAT32, max_model_len=128, max_num_seqs=6
    )
    with closing(rank_engine.open_engine(config, SEAT)) as engine:
        engine.record(RecordingRequest(tmp_path, 0, 4))
        for _ in engine.generate(requests_of(1, 3)):
            continue
        engine.write_recording(["a test"])
        ids = [op.id for op in engine._worker.program]
    nodes = read_graph_nodes(tmp_path / "rank0.graphs.json")
    assert nodes is not None
    assert [(graph.rows, graph.part) for graph in nodes.graphs] == [
        (rows, part) for part in ("model", "draw") for rows in (1, 2, 4, 6)
    ]
    for graph in nodes.graphs:
        places = [ids.index(nodes.ops[op]) for op in graph.ops if op >= 0]
        assert places == sorted(places), "kernels come in the program's order"
    model = {nodes.ops[op] for op in nodes.graphs[0].ops if op >= 0}
    assert {"embed", "layers.0.attn.core", "layers.1.mlp.down", "head"} <= model
    assert "sample" in {nodes.ops[op] for op in nodes.graphs[4].ops if op >= 0}
