"""Build DeepSpeed's shared-memory all-reduce once, where this machine can use it.

    python -m tpinfer.machine.build_deepspeed

Needs the extra `cpu-collectives`. Does nothing, and says why, where the op would not be used.
"""

import os
import shutil
import sys

from tpinfer.collectives.deepspeed_shm import library_path, why_not
from tpinfer.machine.discover import discover_machine


def build_deepspeed() -> str:
    """What was done, in a sentence."""
    target = library_path()
    if target.is_file():
        return f"DeepSpeed's all-reduce: {target}"
    machine = discover_machine()
    reason = why_not(machine.cpu_flags, 1, machine.num_cores, machine.shared_memory_free_bytes)
    if reason is not None:
        return f"DeepSpeed's all-reduce: not built, {reason}"
    try:
        from deepspeed.ops.op_builder import ShareMemCommBuilder  # pyright: ignore
    except ImportError:
        return (
            "DeepSpeed's all-reduce: not built, pip install 'tpinfer[cpu-collectives]' brings its "
            "source"
        )
    built = ShareMemCommBuilder().load(verbose=False)
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_suffix(f".{os.getpid()}")
    shutil.copyfile(built.__file__, fresh)
    fresh.replace(target)
    return f"DeepSpeed's all-reduce: built, {target}"


def main() -> int:
    """Build; not being able to is no failure, since our own ring does the same."""
    try:
        print(build_deepspeed())
    except (RuntimeError, OSError) as error:
        print(f"DeepSpeed's all-reduce: not built, {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
