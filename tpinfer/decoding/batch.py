"""What the rows of one step ask for, sorted by how they are served. Plain Python: no tensor is
looked at, so every rank sorts alike."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tpinfer.decoding.masses import Scale, factor_of
from tpinfer.decoding.random_numbers import uniforms
from tpinfer.layers.step_inputs import SamplingRow
from tpinfer.steps.sampling_record import edits_logits, num_candidates, sums_masses


@dataclass(slots=True)
class Batch:
    """Row numbers by need; each list rises."""

    rows: Sequence[SamplingRow]
    device: torch.device
    tiers: dict[int, list[int]] = field(default_factory=dict)
    """Number of candidates -> rows that send so many."""
    edited: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    """Rows with a temperature."""
    among_candidates: list[int] = field(default_factory=list)
    """Sampled rows whose candidates hold all that may be drawn."""
    by_mass: list[int] = field(default_factory=list)
    """The other sampled rows."""
    with_logprobs: list[int] = field(default_factory=list)
    num_top: int = 1
    """Likeliest tokens of the model's own logits that any row reports; 1 at least, which gives the
    largest logit."""

    def column(self, rows: Sequence[int], name: str, dtype: torch.dtype) -> torch.Tensor:
        """A field of some rows' records, [n, 1]."""
        values = [getattr(self.rows[i].record, name) for i in rows]
        return torch.tensor(values, dtype=dtype, device=self.device).unsqueeze(1)

    def scale(self, rows: Sequence[int], highest: torch.Tensor) -> Scale:
        """How some rows turn logits to masses; highest is float32 [n]."""
        records = [self.rows[i].record for i in rows]
        factors = [factor_of(record.temperature) for record in records]
        least = {record.min_p for record in records}
        return Scale(
            highest.unsqueeze(1),
            torch.tensor(factors, dtype=torch.float32, device=self.device).unsqueeze(1),
            self.column(rows, "min_p", torch.float32),
            least.pop() if len(least) == 1 else None,
        )

    def numbers(self, rows: Sequence[int]) -> torch.Tensor:
        """The random numbers of some rows, float64 [n]."""
        chosen = [self.rows[i] for i in rows]
        keys = [(row.record.seed, row.record.index, row.position, 0) for row in chosen]
        return torch.from_numpy(uniforms(keys)).to(self.device)


def sort_rows(rows: Sequence[SamplingRow], device: torch.device) -> Batch:
    """Sort a step's rows."""
    batch = Batch(rows, device)
    for i, row in enumerate(rows):
        record = row.record
        batch.tiers.setdefault(num_candidates(record), []).append(i)
        if edits_logits(record):
            batch.edited.append(i)
        if record.temperature > 0:
            batch.sampled.append(i)
            (batch.by_mass if sums_masses(record) else batch.among_candidates).append(i)
        if record.num_logprobs >= 0:
            batch.with_logprobs.append(i)
            batch.num_top = max(batch.num_top, record.num_logprobs)
    return batch
