"""Predictions of published points: the step model of each one's placement, and the room that its
engine leaves for the cache, by the runtime's own arithmetic."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpinfer.config.dtypes import DType
from tpinfer.config.errors import ConfigError
from tpinfer.config.model import ModelSpec
from tpinfer.costs.kv_capacity import MemoryRequest, plan_memory
from tpinfer.costs.ledger import CostLedger
from tpinfer.planner.datasheet import Datasheet, datasheet_of
from tpinfer.planner.engines import EngineHabits, engine_named
from tpinfer.planner.fabrics import fabric_times
from tpinfer.planner.precision import Precision, precision_named
from tpinfer.planner.published import Point
from tpinfer.planner.steady_state import Load, saturated_tokens_per_s, steady_state
from tpinfer.planner.step_model import StepModel
from tpinfer.planner.traits import Traits
from tpinfer.sharding.partition import partition_model

_WORKSPACE_SHARE = 0.25
"""Of the memory that weights leave, what activations take at most: an engine short of room is
started with smaller steps."""
_FAST = Traits(
    memory=1.0, compute=1.0, kv_read=1.0, attention=1.0, kernel_floor=1e-3, collective=1e-3,
    host_step_s=0.0, host_row_s=0.0, overlap_power=16.0,
)  # fmt: skip
"""Nothing but the datasheet's rates."""


@dataclass(frozen=True, slots=True)
class _Placed:
    model: StepModel
    sheet: Datasheet
    habits: EngineHabits


class PointModels:
    """Step models of points, each made once."""

    def __init__(self, specs: Mapping[str, ModelSpec]) -> None:
        """`specs` by the names that `published` gives models."""
        self._specs = specs
        self._placed: dict[tuple[object, ...], _Placed] = {}

    def value(self, point: Point, traits: Traits) -> float:
        """What `point.value` should be: seconds of TPOT, or output tokens a second.

        Raises ConfigError for what does not fit, or is not known: model, device, engine, precision.
        """
        placed = self._place(point, traits)
        model = self.step_model(point, traits)
        # As many batches as stages are on their way at once, and share the cache.
        lanes, load = point.pp, self._load(placed, point, traits)
        if point.concurrency is None:
            length = point.num_requests and max(1, point.num_requests // lanes)
            return lanes * saturated_tokens_per_s(model, load, load.running, length)
        return steady_state(model, load).tpot.total

    def least_tpot_s(self, point: Point, traits: Traits) -> float:
        """The TPOT of a closed loop at the datasheet's peaks, with nothing lost: what is measured
        below it did not compute all its prompts, or did not hold its concurrency."""
        placed = self._place(point, traits)
        device = placed.sheet.peak_device()
        model = StepModel(
            placed.model.ledger, device, placed.model.links, _FAST, placed.model.precision
        )
        load = self._load(placed, replace(point, concurrency=point.concurrency or 1), traits)
        return steady_state(model, load).tpot.total

    def step_model(self, point: Point, traits: Traits) -> StepModel:
        """What prices the steps of a point. Raises ConfigError as `value`."""
        return self._place(point, traits).model.with_traits(traits)

    def kv_capacity_tokens(self, point: Point, traits: Traits) -> int:
        """Tokens that the cache of one replica holds."""
        return self._kv_tokens(self._place(point, traits), traits)

    def _place(self, point: Point, traits: Traits) -> _Placed:
        kv = traits.kv
        key = (point.group, point.model, point.tp, point.pp, kv)
        if key not in self._placed:
            self._placed[key] = self._make(point, kv)
        return self._placed[key]

    def _make(self, point: Point, kv: str) -> _Placed:
        if point.model not in self._specs:
            raise ConfigError(f"model {point.model} is unknown; known are {', '.join(self._specs)}")
        spec, habits = self._specs[point.model], engine_named(point.engine)
        precision, sheet = precision_named(point.precision), datasheet_of(point.device)
        precision = precision.with_kv(_kv_dtype(precision, habits, kv))
        partition = partition_model(spec, point.tp)
        ledger = CostLedger(spec, partition, 0, precision.activation, precision.kv)
        links = fabric_times(sheet.fabric, point.engine, point.tp, sheet.link_bytes_per_s)
        model = StepModel(ledger, sheet.device(), links, Traits(), precision, point.pp)
        return _Placed(model, sheet, habits)

    def _load(self, placed: _Placed, point: Point, traits: Traits) -> Load:
        """What one of the batches on their way has running: as many as are there and fit."""
        habits, lanes = placed.habits, point.pp
        share = 1.0 if habits.reserves_output else 0.5
        each = point.input_len + share * point.output_len
        running = self._kv_tokens(placed, traits) / lanes / each
        running = min(running, habits.max_num_seqs)
        if point.concurrency is not None:
            running = min(running, -(-point.concurrency // lanes))
        # Requests of published runs are of one length: batches of a pipeline keep in step, and
        # leave no bubbles behind prompts.
        return Load(
            point.input_len, point.output_len, max(1.0, running), habits.max_num_batched_tokens
        )

    def _kv_tokens(self, placed: _Placed, traits: Traits) -> int:
        ledger, habits, stages = placed.model.ledger, placed.habits, placed.model.num_stages
        weights = placed.model.weight_bytes / stages
        size, share = placed.sheet.memory_bytes, habits.memory_share
        if habits.shares_rest:
            free = (size - weights - traits.reserved_bytes) * share
        else:
            free = size * share - weights - traits.reserved_bytes
        rows, tokens = habits.max_num_seqs, habits.max_num_batched_tokens
        part = min(1.0, _WORKSPACE_SHARE * free / ledger.activation_bytes(tokens, rows))
        request = MemoryRequest(
            available_bytes=int(free),
            kv_bytes=None,
            block_size=16,
            max_num_seqs=max(1, int(rows * part)),
            max_num_batched_tokens=max(1, int(tokens * part)),
            max_model_len=1 << 30,
        )
        return plan_memory(ledger, request).capacity_tokens * stages


def _kv_dtype(precision: Precision, habits: EngineHabits, kv: str) -> DType:
    if kv != "auto":
        return precision_named(kv).kv if kv != "fp8" else DType.FLOAT8_E4M3
    is_small = precision.weight_bytes <= 1 and habits.quantizes_kv
    return DType.FLOAT8_E4M3 if is_small else precision.activation
