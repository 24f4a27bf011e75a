"""Random ledgers and steps for the cost tests, and what a step touches counted one by one."""

from dataclasses import dataclass
from math import prod

from hypothesis import strategies as st

from tests.pure.models import tiny
from tpinfer.config.dtypes import DType
from tpinfer.config.model import ModelSpec
from tpinfer.costs.ledger import CostLedger
from tpinfer.costs.ops import StepAggregates, aggregate
from tpinfer.sharding.parameters import decoder_parameters
from tpinfer.sharding.partition import partition_model

HEADS = [(1, 1), (4, 2), (4, 4), (6, 3), (9, 3), (8, 1), (8, 2), (5, 5)]
DTYPES = [DType.FLOAT32, DType.BFLOAT16, DType.FLOAT16]


@dataclass(frozen=True)
class Step:
    """A step's sequences as (query tokens, context tokens), and how many rows want logits."""

    sequences: tuple[tuple[int, int], ...]
    num_rows: int
    is_greedy: bool

    @property
    def num_tokens(self) -> int:
        """Query tokens."""
        return sum(sq for sq, _ in self.sequences)

    def aggregates(self, window: int | None) -> StepAggregates:
        """The sums that formulas take."""
        return aggregate(
            [sq for sq, _ in self.sequences],
            [sk for _, sk in self.sequences],
            self.num_rows,
            0 if self.is_greedy else self.num_rows,
            window,
        )

    def attended(self, window: int | None) -> tuple[int, int]:
        """(query, key) pairs one by one, and keys that at least one query of a sequence sees."""
        num_pairs = num_keys = 0
        for sq, sk in self.sequences:
            seen: set[int] = set()
            for query in range(sk - sq, sk):
                keys = [k for k in range(query + 1) if window is None or k > query - window]
                num_pairs += len(keys)
                seen |= set(keys)
            num_keys += len(seen)
        return num_pairs, num_keys


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    """Small shapes with every feature on or off."""
    num_heads, num_kv_heads = draw(st.sampled_from(HEADS))
    num_layers = draw(st.integers(1, 3))
    slides = draw(st.sampled_from(["none", "all", "first"]))
    return tiny(
        num_layers=num_layers,
        hidden_size=draw(st.integers(1, 24)),
        intermediate_size=draw(st.integers(9, 80)),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(9, 90)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=None if slides == "none" else draw(st.integers(1, 9)),
        sliding_layers={
            "none": (),
            "all": (True,) * num_layers,
            "first": (True,) + (False,) * (num_layers - 1),
        }[slides],
    )


@st.composite
def ledgers(draw: st.DrawFn) -> list[CostLedger]:
    """The ledgers of all ranks of a group, 0 first."""
    spec = draw(specs())
    size = draw(st.integers(1, min(4, spec.num_heads)))
    shares = draw(st.none() | st.lists(st.integers(1, 3), min_size=size, max_size=size))
    compute, kv = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    partition = partition_model(spec, size, shares)
    return [CostLedger(spec, partition, rank, compute, kv) for rank in range(size)]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Prefills, chunks behind a context, and decodes, mixed."""
    lengths = st.tuples(st.integers(1, 9), st.integers(0, 20))
    sequences = [
        (sq, sq + before) for sq, before in draw(st.lists(lengths, min_size=1, max_size=4))
    ]
    return Step(tuple(sequences), draw(st.integers(0, len(sequences))), draw(st.booleans()))


def weights(ledger: CostLedger) -> dict[str, tuple[int, ...]]:
    """Local shape of each parameter of the ledger's rank, by name."""
    found = decoder_parameters(ledger.spec, ledger.partition, ledger.compute_dtype)
    return {one.name: one.shard.local_shape(ledger.rank) for one in found}


def linear_weight(ledger: CostLedger, op_id: str) -> tuple[tuple[int, ...], int]:
    """(local [outer, inner], elements of the local bias) of a linear op."""
    shapes = weights(ledger)
    tied = op_id == "head" and ledger.spec.tie_embeddings
    shape = shapes["embed.weight" if tied else f"{op_id}.weight"]
    return shape, prod(shapes.get(f"{op_id}.bias", (0,)))
