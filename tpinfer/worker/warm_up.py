"""The steps a rank runs before any request comes, so that none waits for what is compiled, tuned or
connected at a first call: prompts alone and beside a row that decodes. Decodes alone are recorded.
"""

from tpinfer.scheduling.limits import SchedulerLimits
from tpinfer.steps.plan import SamplingRecord, SequenceRecord, StepPlan
from tpinfer.worker.worker import Worker

PROMPT_TOKENS = 32
"""Of the prompts: more than are taken for drafts of a decode."""
_GREEDY = SamplingRecord(0.0)


def warm_up(worker: Worker, limits: SchedulerLimits) -> int:
    """Run them, and leave nothing behind but what lies in the cache, which nobody looks up. A
    collective call. Returns how many steps ran."""
    plans = warm_up_plans(limits)
    for plan in plans:
        new, count = plan.rows[-1], plan.num_tokens[-1]
        worker.admit(SequenceRecord(new, (0,) * count, count, 0, _GREEDY))
        worker.execute(plan)
    worker.rows.release((0, 1))
    worker.take_measurements()
    return len(plans)


def warm_up_plans(limits: SchedulerLimits) -> list[StepPlan]:
    """A prompt; and where two rows and their blocks fit, another one beside its first decode. Empty
    where not even one fits."""
    room = min(limits.max_num_batched_tokens, limits.max_model_len) - 1
    count = min(PROMPT_TOKENS, room)
    first = _blocks(limits, count + 1, 0)
    if count < 1 or not first:
        return []
    plans = [StepPlan(0, (0,), (count,), (1,), ((0, *first),))]
    second = _blocks(limits, count, len(first))
    if limits.max_num_seqs > 1 and second:
        plans.append(StepPlan(1, (0, 1), (1, count), (1, 1), ((1, *second),)))
    return plans


def _blocks(limits: SchedulerLimits, num_tokens: int, num_taken: int) -> list[int]:
    """Blocks for a sequence, each of the class of its place, behind `num_taken` of another one;
    empty where the cache has too few."""
    groups = limits.num_groups
    begin = -(-num_taken // groups) * groups
    end = begin + -(-num_tokens // limits.block_size)
    return list(range(begin, end)) if end <= limits.num_blocks else []
