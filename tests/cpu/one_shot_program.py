"""Cases of `test_one_shot`: python -m tests.cpu.one_shot_program CASE. Ranks are real processes
whose segments are files that all of them map."""

import re
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.cpu.triton_interpreter import interpret

CASE = sys.argv[1]
if CASE != "compiled":
    interpret()

import torch  # noqa: E402

from tpinfer.collectives.triton_one_shot import (  # noqa: E402
    MAX_BLOCKS,
    MAX_FUSED_ROWS,
    OneShot,
    aligned_half,
    gather_parts,
    give_up,
    segment_bytes,
    sum_and_norm,
    sum_parts,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
"""Two roundings of the dtype, relative."""
HALF = aligned_half(64 << 10)
LAST_COUNT = (1 << 30) - 2
"""Launches are counted from here, so that counts wrap within the test."""
SIZES = (1, 2049, 5000)
EPS = 1e-5


def segments(directory: Path, size: int) -> list[torch.Tensor]:
    """All ranks' segments, as this process maps them."""
    num_bytes = segment_bytes(HALF, size)
    return [
        torch.from_file(str(directory / f"{r}"), shared=True, size=num_bytes, dtype=torch.uint8)
        for r in range(size)
    ]


def make_segments(directory: Path, size: int) -> None:
    """Files whose flags say that LAST_COUNT launches are over."""
    for rank in range(size):
        words = torch.zeros(segment_bytes(HALF, size) // 4, dtype=torch.int32)
        words[HALF // 2 + 32 :] = LAST_COUNT
        (directory / f"{rank}").write_bytes(words.numpy().tobytes())


def open_rank(directory: Path, rank: int, size: int) -> tuple[OneShot, list[torch.Tensor]]:
    mapped = segments(directory, size)
    addresses = torch.tensor([one.data_ptr() for one in mapped])
    launches = torch.full((MAX_BLOCKS,), LAST_COUNT, dtype=torch.int32)
    return OneShot(rank, size, addresses, launches, HALF, is_timed=False), mapped


def parts(size: int, *shape: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """What each rank brings."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw).to(dtype) for _ in range(size)]


def summed(all_parts: list[torch.Tensor]) -> torch.Tensor:
    """In rank order, in float32, rounded once."""
    total = torch.zeros(all_parts[0].shape)
    for part in all_parts:
        total = total + part.float()
    return total.to(all_parts[0].dtype)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    limit = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found, expected, rtol=limit, atol=limit)


def rank_sums(directory: Path, rank: int, size: int) -> None:
    """Sums of changing sizes, alone and with their norm; ranks come late in turn."""
    one_shot, _ = open_rank(directory, rank, size)
    stamps = torch.full((64,), -1)
    place = 0
    for round_number in range(2):
        for dtype in DTYPES:
            for num in SIZES:
                bring = parts(size, num, dtype=dtype, seed=num + round_number)
                if place % size == rank:
                    time.sleep(0.01)
                mine = bring[rank].clone()
                one_shot.sum(mine, stamps[place : place + 1])
                if dtype is torch.bfloat16:  # which the interpreter cuts off
                    close(mine, summed(bring))
                else:
                    assert torch.equal(mine, summed(bring)), (dtype, num)
                place += 1
            fused_rows(one_shot, dtype, stamps[60:61])
        gathers(one_shot, stamps[60:61])
    assert int(stamps[:place].min()) >= 0, "every sum left a stamp"
    assert int(stamps[place:60].max()) == -1, "and nothing else did"
    assert int(one_shot.launches.min()) == int(one_shot.launches.max()) < 100, "counts wrapped"


def gathers(one_shot: OneShot, stamp: torch.Tensor) -> None:
    for bring in ([torch.arange(5) + (r << 40) for r in range(one_shot.size)],
                  parts(one_shot.size, 2, 1100, dtype=torch.bfloat16, seed=5)):  # fmt: skip
        out = torch.zeros(one_shot.size, *bring[0].shape, dtype=bring[0].dtype)
        one_shot.gather(out, bring[one_shot.rank], stamp)
        assert torch.equal(out, torch.stack(bring))


def fused_rows(one_shot: OneShot, dtype: torch.dtype, stamp: torch.Tensor) -> None:
    shapes = [(1, 64), (3, 72)]
    if dtype is torch.float16 and one_shot.size == 2:
        shapes.append((MAX_FUSED_ROWS, 16))
    for rows, width in shapes:
        bring = parts(one_shot.size, rows, width, dtype=dtype, seed=width)
        residual, weight = parts(2, rows, width, dtype=dtype, seed=rows)
        found = residual.clone()
        delta = bring[one_shot.rank].clone()
        hidden = one_shot.sum_and_norm(delta, found, weight[0].contiguous(), EPS, stamp)
        assert torch.equal(delta, bring[one_shot.rank])
        expected = residual + summed(bring)
        close(found, expected)
        wide = found.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        close(hidden, (wide * weight[0].float()).to(dtype))


def rank_late(directory: Path, rank: int, size: int) -> None:
    """The last rank comes late: the others' stamps say so, its own does not."""
    one_shot, mapped = open_rank(directory, rank, size)
    stamp = torch.zeros(1, dtype=torch.int64)
    one_shot.sum(torch.ones(8), stamp)  # all are there, and compiled
    if rank == size - 1:
        until = time.monotonic() + 60
        words = [part.view(torch.int32) for part in mapped]
        while int(words[rank][HALF // 2 + 32]) < 0 or any(
            int(words[rank][HALF // 2 + 32 + peer]) == LAST_COUNT + 1 for peer in range(rank)
        ):
            assert time.monotonic() < until, "the peers did not come"
            time.sleep(0.01)
    one_shot.sum(torch.ones(8), stamp)
    waited = int(stamp)
    assert waited == 0 if rank == size - 1 else waited > 0, waited


def rank_given_up(directory: Path, rank: int, size: int) -> None:
    """The last rank never comes but gives the group up: nobody hangs, then or later."""
    one_shot, mapped = open_rank(directory, rank, size)
    stamp = torch.zeros(1, dtype=torch.int64)
    if rank == size - 1:
        time.sleep(0.3)
        for segment in mapped:
            give_up(segment, HALF)
        return
    for _ in range(3):
        one_shot.sum(torch.ones(8), stamp)
        one_shot.sum_and_norm(torch.ones(1, 8), torch.ones(1, 8), torch.ones(8), EPS, stamp)


def refused() -> None:
    """What cannot be summed says why."""
    one_shot = OneShot(0, 2, torch.zeros(2, dtype=torch.int64), torch.zeros(1), HALF, False)
    stamp = torch.zeros(1, dtype=torch.int64)
    cases = (
        (torch.zeros(4, dtype=torch.int64), "int64 parts"),
        (torch.zeros(4, dtype=torch.float64), "float64 parts"),
        (torch.zeros(4, 5).t(), "contiguous"),
        (torch.zeros(HALF), "larger than"),
    )
    for t, words in cases:
        try:
            one_shot.sum(t, stamp)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words} was not said")
    rows = torch.zeros(MAX_FUSED_ROWS + 1, 2)
    try:
        one_shot.sum_and_norm(rows, rows, torch.zeros(2), EPS, stamp)
    except ValueError as error:
        assert "65 rows" in str(error)
    else:
        raise AssertionError("too many rows were not refused")
    one_shot.sum(torch.zeros(0), stamp)  # nothing to add: nobody is met
    try:
        one_shot.gather(torch.zeros(2, 3).bool(), torch.zeros(3).bool(), stamp)
    except ValueError as error:
        assert "3 bytes" in str(error)
    else:
        raise AssertionError("bytes that are no words were not refused")


def compiled() -> None:
    """For sm_90, without one; and what the order of memory hangs on is in the machine's words."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for dtype in ("bf16", "fp16", "fp32"):
        for world, lanes in ((2, 4), (3, 4), (4, 8), (8, 16)):
            if world != 4 and dtype != "bf16":
                continue
            for kernel, block in ((sum_parts, 2048), (sum_and_norm, 4096), (gather_parts, 2048)):
                constants = {"WORLD": world, "LANES": lanes, "SLOTS": MAX_BLOCKS, "TIMED": True,
                             "BLOCK": block}  # fmt: skip
                of = dict.fromkeys(
                    ("t_ptr", "delta_ptr", "residual_ptr", "weight_ptr", "hidden_ptr", "out_ptr"),
                    f"*{dtype}",
                )
                typed = of | {"segments_ptr": "*i64", "launches_ptr": "*i32", "stamp_ptr": "*i64",
                              "half_bytes": "i64", "eps": "fp32"}  # fmt: skip
                signature = {
                    name: "constexpr" if name in constants else typed.get(name, "i32")
                    for name in kernel.arg_names
                }
                # As the launcher finds them: tensors and counts that 16 divides.
                aligned = {
                    (i,): [["tt.divisibility", 16]]
                    for i, name in enumerate(kernel.arg_names)
                    if typed.get(name, "")[:1] == "*"
                    or name in ("num_elements", "width", "half_bytes")
                }
                made = triton.compile(
                    ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
                    target=GPUTarget("cuda", 90, 32), options={"num_warps": 8},
                )  # fmt: skip
                ptx = made.asm["ptx"]
                assert made.asm["cubin"], "no machine code"
                publish = ptx.index("sys.release.exch")
                assert "bar.sync" in ptx[:publish], "all threads' stores lie before the release"
                assert "acquire.sys.cas" in ptx[publish:]
                assert ptx.count("globaltimer") == 2
                assert re.search(r"ld.global.cg.v[24]", ptx), (
                    "parts are read in words of 8 bytes up"
                )


def several(case: str, size: int) -> None:
    """Run a case in `size` processes."""
    with TemporaryDirectory() as name:
        make_segments(Path(name), size)
        command = [sys.executable, "-m", "tests.cpu.one_shot_program", case, name]
        ranks = [subprocess.Popen([*command, str(r), str(size)]) for r in range(size)]
        try:
            codes = [rank.wait(timeout=120) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        assert codes == [0] * size, codes


if __name__ == "__main__":
    if len(sys.argv) > 2:
        torch.set_num_threads(1)
        globals()[CASE](Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    elif CASE in ("refused", "compiled"):
        globals()[CASE]()
        print(f"{CASE} agrees")
    else:
        name, _, size = CASE.rpartition("-")
        several(f"rank_{name}", int(size))
        print(f"{CASE} agrees")
