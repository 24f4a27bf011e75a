"""One rank's recording of some steps with torch's profiler: shapes on, stacks off.

Starts and stops between steps, on every rank at the same step. Writes one Kineto file a rank, which
a child process compresses. The device's clocks are sampled meanwhile and written beside it, as is
which kernel of a replayed graph belongs to which op; cost manifests, the host's clock and the run's
facts by `engine.recording`.
"""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter_ns

import torch

from tpinfer.config.clock_samples import ClockSamples, clock_samples_path, write_clock_samples
from tpinfer.costs.graph_nodes import graph_nodes_path, write_graph_nodes
from tpinfer.machine.clock_source import sampler_of
from tpinfer.machine.clocks import ClockSampler
from tpinfer.worker.annotations import Annotate, nvtx_ranges, together, torch_ranges
from tpinfer.worker.worker import Worker


class Capture:
    """Recording on one rank."""

    def __init__(self, worker: Worker, all_threads: bool = False) -> None:
        """all_threads: steps run on another thread than the one that starts the recording."""
        self._worker = worker
        self._all_threads = all_threads
        self._standing: list[Annotate] = []
        self._profiler: torch.profiler.profile | None = None
        self._sampler: ClockSampler | None = None
        self._clocks: ClockSamples | None = None
        self.recorded_from_ns = 0
        self.recorded_until_ns = 0

    def use_nvtx(self) -> None:
        """Put NVTX ranges around everything from now on. Raises ConfigError without the package."""
        self._standing = [nvtx_ranges()]
        self._worker.annotate(together(self._standing))
        self._say_rank()

    def start(self) -> None:
        """Begin recording; all ranks leave together. A collective call."""
        from torch._C._profiler import _ExperimentalConfig

        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._worker.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        began_ns = perf_counter_ns()
        self._sampler, _ = sampler_of(self._worker.device, self._worker.group.rank)
        if self._sampler is not None:
            self._sampler.start()
        settings = _ExperimentalConfig(profile_all_threads=self._all_threads)
        profiler = torch.profiler.profile(
            activities=activities, record_shapes=True, experimental_config=settings
        )
        profiler.start()
        group = self._worker.group
        place = {"backend": group.name, "rank": group.rank, "world_size": group.size}
        profiler.add_metadata_json("distributedInfo", json.dumps(place))
        self._profiler = profiler
        self._worker.annotate(together([*self._standing, torch_ranges()]))
        self._cuda_profiler("cudaProfilerStart")
        self._worker.group.barrier()
        self._say_rank()
        self.recorded_from_ns = perf_counter_ns()
        self._worker.spans.add("recorder", began_ns, self.recorded_from_ns)

    def stop(self) -> None:
        """End recording. What was recorded stays in memory until `write`."""
        self.recorded_until_ns = perf_counter_ns()
        self._cuda_profiler("cudaProfilerStop")
        if self._profiler is not None:
            self._profiler.stop()
        if self._sampler is not None:
            self._clocks, self._sampler = self._sampler.stop(), None
        self._worker.annotate(together(self._standing))
        self._worker.spans.add("recorder", self.recorded_until_ns, perf_counter_ns())

    def write(self, directory: Path) -> Path | None:
        """Write this rank's file and compress it in a child; returns its final path, None where
        nothing was recorded."""
        if self._profiler is None:
            return None
        directory.mkdir(parents=True, exist_ok=True)
        rank = self._worker.group.rank
        raw = directory / f"rank{rank}.trace.json"
        final = directory / f"rank{rank}.trace.json.gz"
        self._profiler.export_chrome_trace(str(raw))
        self._profiler = None
        if self._clocks is not None and len(self._clocks):
            write_clock_samples(self._clocks, clock_samples_path(directory, rank))
        nodes = self._worker.graph_nodes()
        if nodes is not None:
            write_graph_nodes(nodes, graph_nodes_path(directory, rank))
        command = [sys.executable, "-m", "tpinfer.launching.pack_trace", str(raw), str(final)]
        subprocess.run(command, check=True)
        return final

    def _say_rank(self) -> None:
        """Nothing else in a report of several processes says which rank each is."""
        group = self._worker.group
        self._worker.spans.mark(f"tpinfer.rank id={group.rank} world={group.size}")

    def _cuda_profiler(self, call: str) -> None:
        """A cudaProfilerApi range, for Nsight's --capture-range."""
        if self._worker.device.type == "cuda":
            with ExitStack() as quiet:
                quiet.callback(torch.cuda.synchronize, self._worker.device)
                getattr(torch.cuda.cudart(), call)()
