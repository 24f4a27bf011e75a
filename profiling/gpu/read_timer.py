"""A one-program kernel that reads the GPU's global timer over and over. Needs triton; module
level, as jit wants."""

import triton
import triton.language as tl


@triton.jit
def read_timer(out_ptr, num_reads: tl.constexpr):
    """Store `num_reads` successive readings of %globaltimer (ns) at out_ptr, int64 [num_reads]."""
    for i in range(num_reads):
        stamp = tl.inline_asm_elementwise(
            "mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1
        )
        tl.store(out_ptr + i, stamp)
