"""Where the prices of a trace come from: the manifest and the graphs' nodes beside it, and the
model the user names."""

from pathlib import Path

from tpinfer.config.huggingface import parse_model_spec, read_model_spec
from tpinfer.config.json_keys import read_json_object
from tpinfer.config.model import ModelSpec
from tpinfer.costs.graph_nodes import graph_nodes_path, read_graph_nodes
from tpprof.classify.manifest import beside, read_manifest
from tpprof.classify.prices import CostSource
from tpprof.errors import TraceError
from tpprof.events import Trace


def cost_source(
    trace: Trace,
    manifest: Path | None = None,
    model: ModelSpec | Path | None = None,
    tp: int | None = None,
) -> CostSource:
    """Prices for one rank. `manifest` overrides the one that lies beside the trace; `model` is a
    shape or a config.json. Raises TraceError or ConfigError for files that cannot be used.
    """
    path = manifest or beside(trace.source, trace.rank)
    spec = model if isinstance(model, ModelSpec) or model is None else _spec(model)
    size = tp or max(trace.world_size, 1)
    if spec is not None and not 1 <= size <= spec.num_heads:
        raise TraceError(
            f"--tp {size} is more than the model's {spec.num_heads} attention heads; check --model "
            "and --tp"
        )
    nodes = None
    if path:
        nodes = read_graph_nodes(graph_nodes_path(Path(trace.source).parent, trace.rank))
    return CostSource(read_manifest(path) if path else None, spec, size, nodes)


def _spec(path: Path) -> ModelSpec:
    """Of a checkpoint's directory, or of the very file that was named, whatever its name."""
    if path.is_dir():
        return read_model_spec(path)
    return parse_model_spec(read_json_object(path), str(path))
