"""Whether a rank replays its decode steps, agreed upon by all ranks."""

from collections.abc import Callable, Sequence

import torch

from tpinfer.collectives.group import Group
from tpinfer.costs.choices import Choice, recorded_choice
from tpinfer.worker.graphs import RecordedSteps, Recorder, row_counts
from tpinfer.worker.measurements import gather_bytes
from tpinfer.worker.worker import Worker

_FINE = "-"
"""Says a rank that recorded its steps: a gather of nothing is no gather."""


def record_steps(
    worker: Worker,
    groups: Sequence[Group],
    max_num_rows: int,
    recorder: Recorder,
    progress: Callable[[str], None],
) -> Choice:
    """Have a worker replay its decode steps from now on; what was recorded, or why nothing was. A
    collective call: where one rank cannot record, none replays."""
    unable = [group.name for group in groups if not group.can_record]
    if unable:
        return recorded_choice((), f"{unable[0]} works on the host and cannot be recorded")
    progress("recording decode steps")
    counts, why = row_counts(max_num_rows), ""
    steps = RecordedSteps(worker.program, worker.rows, recorder)
    try:
        with torch.inference_mode():
            steps.record(counts)
    except RuntimeError as error:
        why = (str(error).splitlines() or ["no reason given"])[0][:160]
    whys = [why]
    if groups[0].size > 1:
        payload = (why or _FINE).encode()
        whys = [one.decode() for one in gather_bytes(groups[0], payload, worker.device)]
    failed = [one for one in whys if one not in ("", _FINE)]
    if failed:
        return recorded_choice((), f"recording failed: {failed[0]}")
    worker.use_recorded(steps)
    return recorded_choice(counts, "others run op by op, as do prompts and sampled rows")
