"""Collectives of one kind and size added up, and whom the waiting was for."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tpprof.report.op_sums import fold_layer
from tpprof.results import CollectiveResult, Report


@dataclass(frozen=True, slots=True)
class CollectiveSum:
    """All collectives of one name, size, group and method."""

    name: str
    bytes: int
    """Message bytes of one rank in one of them; -1 where unknown."""
    ranks: tuple[int, ...]
    count: int
    wait_ns: tuple[int, ...]
    """Per entry of `ranks`."""
    transfer_ns: tuple[int, ...]
    """Per entry of `ranks`."""
    busbw_gbps: float | None
    """Mean over the transfer time; None where no entry had one."""
    method: str
    caused: Mapping[tuple[int, str], int] = field(default_factory=dict)
    """(rank that came last, what it was doing without layer) -> ns that others waited for it."""

    @property
    def time_ns(self) -> int:
        """Wait and transfer over all ranks."""
        return sum(self.wait_ns) + sum(self.transfer_ns)

    @property
    def worst(self) -> tuple[int, str, float]:
        """Rank waited for most, what it was mostly doing, its share of the waiting; -1 for none."""
        by_rank: dict[int, int] = {}
        for (rank, _), spent in self.caused.items():
            by_rank[rank] = by_rank.get(rank, 0) + spent
        total = sum(by_rank.values())
        if not total:
            return -1, "", 0.0
        rank = min(by_rank, key=lambda one: (-by_rank[one], one))
        doing = {was: spent for (who, was), spent in self.caused.items() if who == rank}
        return rank, min(doing, key=lambda was: (-doing[was], was)), by_rank[rank] / total


def sum_collectives(collectives: Iterable[CollectiveResult]) -> list[CollectiveSum]:
    """One sum per (name, bytes, ranks, method), most time first."""
    kinds: dict[tuple[str, int, tuple[int, ...], str], list[CollectiveResult]] = {}
    for one in collectives:
        kinds.setdefault((one.name, one.bytes, tuple(one.ranks), one.method), []).append(one)
    sums = [_sum(key, members) for key, members in kinds.items()]
    return sorted(sums, key=lambda one: (-one.time_ns, one.name, one.bytes))


def waits_by_cause(report: Report, rank: int) -> dict[tuple[int, str], int]:
    """ns that `rank` waited in collectives, by (rank that came last, what that one was doing)."""
    waits: dict[tuple[int, str], int] = {}
    for one in report.collectives:
        if rank in one.ranks:
            spent = one.wait_ns[one.ranks.index(rank)]
            if spent:
                key = one.last_rank, fold_layer(one.last_rank_was)
                waits[key] = waits.get(key, 0) + spent
    return dict(sorted(waits.items(), key=lambda item: (-item[1], item[0])))


def _sum(
    key: tuple[str, int, tuple[int, ...], str], members: list[CollectiveResult]
) -> CollectiveSum:
    name, num_bytes, ranks, method = key
    caused: dict[tuple[int, str], int] = {}
    carried, carrying_ns = 0.0, 0
    for one in members:
        if one.last_rank >= 0 and (spent := sum(one.wait_ns)):
            who = one.last_rank, fold_layer(one.last_rank_was)
            caused[who] = caused.get(who, 0) + spent
        longest = max(one.transfer_ns, default=0)
        if one.busbw_gbps is not None and longest > 0:
            carried += one.busbw_gbps * longest
            carrying_ns += longest
    columns = range(len(ranks))
    return CollectiveSum(
        name=name,
        bytes=num_bytes,
        ranks=ranks,
        count=len(members),
        wait_ns=tuple(sum(one.wait_ns[i] for one in members) for i in columns),
        transfer_ns=tuple(sum(one.transfer_ns[i] for one in members) for i in columns),
        busbw_gbps=carried / carrying_ns if carrying_ns else None,
        method=method,
        caused=caused,
    )
