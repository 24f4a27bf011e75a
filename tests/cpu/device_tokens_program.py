"""`tpinfer` with its ranks' group replaced by a `DeviceGroup` over a fake of torch's symmetric
memory: python -m tests.cpu.device_tokens_program DIRECTORY STAMPS ARGUMENTS. Each rank writes the
waits of its steps to STAMPS-RANK."""

import json
import sys
from pathlib import Path
from typing import Any

from tests.cpu.device_group_program import open_rank
from tpinfer.collectives import device_group
from tpinfer.collectives.choose import CollectiveChoice
from tpinfer.collectives.triton_one_shot import OneShot
from tpinfer.launching.ranks import launch

NAME = "tests.cpu.device_tokens_program"


def main() -> int:
    from tpinfer.config.environment import read_environment

    directory, stamps, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
    found = read_environment().rank
    if found is None:
        return launch(sys.argv[1:], 2, start="processes", module=NAME)
    from tpinfer.cli.main import main as tpinfer
    from tpinfer.worker import assemble
    from tpinfer.worker.worker import Worker

    device_group.LARGE_BYTES = 4 << 20

    def open_group(*_: object, **__: object) -> Any:
        group, words, why = open_rank(Path(directory), found.rank, found.world)
        return group, CollectiveChoice(group.name, words, why)

    num_normed = [0]
    sum_and_norm = OneShot.sum_and_norm

    def counted(self: OneShot, *arguments: Any) -> Any:
        num_normed[0] += 1
        return sum_and_norm(self, *arguments)

    OneShot.sum_and_norm = counted  # pyright: ignore[reportAttributeAccessIssue]
    steps: list[list[int]] = []
    keep = Worker._keep_record  # pyright: ignore[reportPrivateUsage]

    def kept(self: Any, plan: Any, aggregates: Any, run: Any, began: int) -> None:
        assert run.waits(), "waits came with the tokens"
        assert num_normed[0] >= 2 * len(self.program) // 20, "sums were normed in one kernel"
        steps.append(run.waits())
        Path(f"{stamps}-{found.rank}").write_text(json.dumps(steps))
        keep(self, plan, aggregates, run, began)

    Worker._keep_record = kept  # pyright: ignore
    assemble.open_group = open_group
    return tpinfer(argv)


if __name__ == "__main__":
    sys.exit(main())
