"""One Triton kernel for attention over the paged cache: decoding, prompts, and chunks behind a
prefix.

A program takes some query tokens of one sequence with all query heads of one KV head, packed as
the rows of its products, and a stretch of the keys. Lengths and block tables are read on the
device, so a recorded launch serves later steps. Where the keys of a sequence are split over
programs, the last of them to arrive merges what all left behind (FlashDecoding's second pass inside
the first kernel), and sets the counter back for the next launch.

Stored int8 and fp8 are never scaled element by element: the scores take the keys' factors and the
probabilities the values'.

Letters: S sequences, T query tokens, H local query heads, K local KV heads, G heads a group, D head
dim, M rows of a program (tokens x G), N keys of a tile.
"""

# Annotations and operators are Triton's own language, which type checkers cannot follow.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportIndexIssue=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

PLAIN, INT8, FP8 = 0, 1, 2
"""How keys and values are stored: as the query's dtype or one that converts, or in 8 bits."""
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _widened(stored, STORED: tl.constexpr, DTYPE: tl.constexpr):
    if STORED == 2:
        return stored.to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return stored.to(DTYPE)


@triton.jit
def _tile(
    accumulated, highest, total, query, n, last_n,
    table, keys, values, key_scales, value_scales,
    positions_M, context, window,
    GROUP: tl.constexpr, PLACE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    N: tl.constexpr, D_PADDED: tl.constexpr, STORED: tl.constexpr, MASKED: tl.constexpr,
    SLIDES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of keys, N local ones from `n`, taken into the running softmax."""
    places = n + tl.arange(0, N)
    dims = tl.arange(0, D_PADDED)
    # Rows of a table behind the context hold anything, so they are not followed.
    known = places < last_n
    block = tl.load(table + places // BLOCK, mask=known, other=0).to(tl.int64)
    slots = block * BLOCK + places % BLOCK
    read = known[:, None] & (dims < D)[None, :]
    offsets = slots[:, None] * D + dims[None, :]
    key = _widened(tl.load(keys + offsets, mask=read, other=0), STORED, query.dtype)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if STORED > 0:
        scores *= tl.load(key_scales + slots, mask=known, other=0.0)[None, :]
    if MASKED:
        position = (places // BLOCK * GROUP + PLACE) * BLOCK + places % BLOCK
        visible = position[None, :] <= positions_M[:, None]
        visible &= (known & (position < context))[None, :]
        if SLIDES:
            visible &= position[None, :] > positions_M[:, None] - window
        scores = tl.where(visible, scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    # A row that has seen no key yet: -inf less -inf is no number.
    floor = tl.where(new_highest == float("-inf"), 0.0, new_highest)
    weights = tl.exp2(scores - floor[:, None])
    shrunk = tl.exp2(highest - floor)
    total = total * shrunk + tl.sum(weights, 1)
    value = tl.load(values + offsets, mask=read, other=0)
    if STORED > 0:
        weights *= tl.load(value_scales + slots, mask=known, other=0.0)[None, :]
    accumulated = accumulated * shrunk[:, None]
    accumulated = tl.dot(
        weights.to(query.dtype), _widened(value, STORED, query.dtype), accumulated,
        input_precision=PRECISION,
    )  # fmt: skip
    return accumulated, new_highest, total


@triton.jit
def paged_attention(
    query_THD, out_THD, lse_TH,
    values_2KSD, scales_2KS, tables_RB, rows_S, first_tokens_S1, context_lens_S,
    partial_out, partial_lse, arrived,
    query_stride, out_stride, num_slots, table_width, num_kv_heads, num_heads, head_offset, window,
    scale_log2, shortest, longest,
    GROUP: tl.constexpr, PLACE: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    G: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    D_PADDED: tl.constexpr, NUM_SPLITS: tl.constexpr, MERGED: tl.constexpr, STORED: tl.constexpr,
    SLIDES: tl.constexpr, HAS_LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (query tiles of TOKENS x NUM_SPLITS, S, K). Sequences of fewer than `shortest` or more
    than `longest` query tokens are left to another launch.

    query_THD: heads adjoin, tokens `query_stride` apart. out_THD [T, H, D], tokens `out_stride`
    apart; lse_TH float32 [T, H], natural logarithms. values_2KSD [2, K, slots, D], scales_2KS
    float32 [2, K, slots] where STORED is in 8 bits. partial_out float32 [S, K, NUM_SPLITS, M, D],
    partial_lse float32 [S, K, NUM_SPLITS, M] and arrived int32 [S, K], all 0 at the first launch,
    are used where NUM_SPLITS > 1, which takes one query tile; MERGED parts are read at
    once. head_offset: of the first local query head inside its group. scale_log2: softmax scale x
    log2(e). GROUP ranks share a KV head's blocks, this one holds those of class PLACE.
    """
    split, tile = tl.program_id(0) % NUM_SPLITS, tl.program_id(0) // NUM_SPLITS
    sequence, kv_head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first = tl.load(first_tokens_S1 + sequence)
    length = tl.load(first_tokens_S1 + sequence + 1) - first
    if (length < shortest) | (length > longest) | (tile * TOKENS >= length):
        return
    context = tl.load(context_lens_S + sequence)
    row = tl.load(rows_S + sequence).to(tl.int64)

    lines = tl.arange(0, M)
    token = tile * TOKENS + lines // G
    padded_head = kv_head.to(tl.int32) * G + lines % G
    head = padded_head - head_offset
    is_mine = (lines < TOKENS * G) & (token < length) & (head >= 0) & (head < num_heads)
    positions_M = context - length + token
    dims = tl.arange(0, D_PADDED)
    token_THD = (first + token).to(tl.int64)
    chosen = is_mine[:, None] & (dims < D)[None, :]
    query = tl.load(
        query_THD + token_THD[:, None] * query_stride + head[:, None] * D + dims[None, :],
        mask=chosen, other=0.0,
    )  # fmt: skip
    query = (query.to(tl.float32) * scale_log2).to(query.dtype)

    # Local keys, in order of position, that any token of the tile sees: [begin, end), in tiles.
    last_position = tl.minimum(context, context - length + (tile + 1) * TOKENS)
    held = (tl.cdiv(tl.maximum(last_position, 0), BLOCK) - PLACE + GROUP - 1) // GROUP
    end = tl.maximum(held, 0) * BLOCK
    if GROUP == 1:
        end = tl.maximum(last_position, 0)
    begin = 0
    if SLIDES:
        low = tl.maximum(context - length + tile * TOKENS - window + 1, 0) // BLOCK
        begin = tl.maximum((low - PLACE + GROUP - 1) // GROUP, 0) * BLOCK
    num_tiles = tl.cdiv(tl.maximum(end - begin, 0), N)
    each = tl.maximum(tl.cdiv(num_tiles, NUM_SPLITS), 1)
    num_used = tl.maximum(tl.cdiv(num_tiles, each), 1)
    if split >= num_used:
        return
    start = begin + split * each * N
    stop = tl.minimum(start + each * N, end)
    # Up to here every key lies before every token of the tile, and in no window's way.
    plain_stop = start
    if not SLIDES:
        seen = tl.maximum(context - length + tile * TOKENS + 1, 0)
        whole = tl.maximum((seen // BLOCK - PLACE + GROUP - 1) // GROUP, 0) * BLOCK
        plain_stop = start + tl.maximum(tl.minimum(whole, stop) - start, 0) // N * N

    table = tables_RB + row * table_width
    keys = values_2KSD + kv_head * num_slots * D
    values = values_2KSD + (num_kv_heads + kv_head) * num_slots * D
    key_scales = scales_2KS + kv_head * num_slots
    value_scales = scales_2KS + (num_kv_heads + kv_head) * num_slots
    accumulated = tl.zeros([M, D_PADDED], tl.float32)
    highest = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for n in tl.range(start, plain_stop, N):
        accumulated, highest, total = _tile(
            accumulated, highest, total, query, n, stop, table, keys, values, key_scales,
            value_scales, positions_M, context, window, GROUP, PLACE, BLOCK, D, N, D_PADDED, STORED,
            False, SLIDES, PRECISION,
        )  # fmt: skip
    for n in tl.range(plain_stop, stop, N):
        accumulated, highest, total = _tile(
            accumulated, highest, total, query, n, stop, table, keys, values, key_scales,
            value_scales, positions_M, context, window, GROUP, PLACE, BLOCK, D, N, D_PADDED, STORED,
            True, SLIDES, PRECISION,
        )  # fmt: skip

    saw = total > 0
    divisor = tl.where(saw, total, 1.0)
    accumulated = accumulated / divisor[:, None]
    lse = tl.where(saw, highest + tl.log2(divisor), float("-inf"))
    if NUM_SPLITS > 1 and num_used > 1:
        corner = sequence.to(tl.int64) * num_kv_heads + kv_head
        mine = (corner * NUM_SPLITS + split) * M
        tl.store(
            partial_out + (mine + lines)[:, None] * D + dims[None, :], accumulated,
            mask=(lines < TOKENS * G)[:, None] & (dims < D)[None, :], cache_modifier=".cg",
        )  # fmt: skip
        tl.store(partial_lse + mine + lines, lse, cache_modifier=".cg")
        tl.debug_barrier()  # the count is one thread's: the others' stores come before it
        before = tl.atomic_add(arrived + corner, 1, sem="acq_rel", scope="gpu")
        if before < num_used - 1:
            return
        tl.store(arrived + corner, 0)
        tl.debug_barrier()
        # Sums of exponents of all splits first, so that no load of a part waits for another's.
        splits = tl.arange(0, NUM_SPLITS)
        first_part = corner * NUM_SPLITS * M
        all_lse = tl.load(
            partial_lse + first_part + splits[:, None] * M + lines[None, :],
            mask=(splits < num_used)[:, None], other=float("-inf"), cache_modifier=".cg",
        )  # fmt: skip
        highest = tl.max(all_lse, 0)
        floor = tl.where(highest == float("-inf"), 0.0, highest)
        total = tl.sum(tl.exp2(all_lse - floor[None, :]), 0)
        accumulated = tl.zeros([M, D_PADDED], tl.float32)
        is_real = (lines < TOKENS * G)[:, None] & (dims < D)[None, :]
        for few in tl.range(0, num_used, MERGED):
            for one in tl.static_range(MERGED):
                other = few + one
                its = first_part + other * M
                its_lse = tl.load(
                    partial_lse + its + lines, mask=other < num_used, other=float("-inf"),
                    cache_modifier=".cg",
                )  # fmt: skip
                its_out = tl.load(
                    partial_out + (its + lines)[:, None] * D + dims[None, :],
                    mask=is_real & (other < num_used), other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                accumulated += its_out * tl.exp2(its_lse - floor)[:, None]
        saw = total > 0
        divisor = tl.where(saw, total, 1.0)
        accumulated = accumulated / divisor[:, None]
        lse = tl.where(saw, highest + tl.log2(divisor), float("-inf"))
    tl.store(
        out_THD + token_THD[:, None] * out_stride + head[:, None] * D + dims[None, :],
        accumulated.to(out_THD.dtype.element_ty), mask=chosen,
    )  # fmt: skip
    if HAS_LSE:
        tl.store(lse_TH + token_THD * num_heads + head, lse * _LN2, mask=is_mine)
