"""What the names of work say: each distinct name is judged once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tpprof.classify.entries import Entries
from tpprof.classify.executions import Executions
from tpprof.classify.rules import Verdict, judge
from tpprof.classify.work import WorkKind
from tpprof.events import Kind, Trace


@dataclass(frozen=True)
class Names:
    """Names of the entries."""

    index: np.ndarray
    """int32 [n]: string index."""
    verdicts: Mapping[int, Verdict]
    """By string index."""

    def kinds(self, num_strings: int) -> np.ndarray:
        """int8 [n]."""
        table = np.zeros(num_strings + 1, np.int8)
        for index, verdict in self.verdicts.items():
            table[index] = verdict.kind
        return table[self.index]


def read_names(trace: Trace, entries: Entries, work: Executions) -> Names:
    """Kernels by rules; of a CPU's operators only collectives say by their name what they are."""
    index = trace.name[entries.row]
    used = np.unique(index).tolist()
    if entries.is_cpu:
        found = {name: _of_operator(work.collective.get(name)) for name in used}
    else:
        verdicts = judge([trace.strings[name] for name in used])
        found = dict(zip(used, verdicts, strict=True))
    return Names(index, found)


def _of_operator(collective: str | None) -> Verdict:
    return Verdict(WorkKind.COMM, collective) if collective else Verdict()


def copies(trace: Trace, entries: Entries) -> np.ndarray:
    """bool [n]: copies and fills."""
    kind = trace.kind[entries.row]
    return (kind == Kind.COPY) | (kind == Kind.MEMSET)
