"""What a rank recorded comes back as it was, and a long run stays bounded."""

from dataclasses import replace

from tests.pure.recorded_runs import record
from tpinfer.worker.step_log import StepLog


def test_records_come_back_whole_and_once() -> None:
    plain = record(1, 1000, [3, 4, 5])
    waited = replace(record(2, 2000, [3, 4, 5]), waits_ns={1: 2, 2: 0})
    gapped = replace(record(3, 3000, [3, 4, 5]), op_starts_ns=[3000, 3004, 3009])
    log = StepLog()
    for one in (plain, waited, gapped):
        assert log.add(one) is None
    assert log.take() == [plain, waited, gapped]
    assert log.take() == []


def test_the_older_half_goes_when_there_are_too_many() -> None:
    log = StepLog(max_steps=4)
    told = [log.add(record(step, 100 * step, [1])) for step in range(1, 6)]
    assert told == [None] * 4 + [300]
    assert [one.step_id for one in log.take()] == [3, 4, 5]
