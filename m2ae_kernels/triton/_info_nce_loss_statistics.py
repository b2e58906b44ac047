"""Statistics of info_nce_loss in Triton: sums over rows and columns of a matrix that nobody writes.

statistics_kernel owns a tile of logits at a time, to base 2: l = scale log2(e) x_i . y_j. It adds
up exp2(l - M) of the negatives along both axes and writes one number per row of the tile and one
per column: [planes, column tiles, rows] and [planes, row tiles, M]. _info_nce_loss_sums.py adds
these up in the order of the tiles: without atomics, and to the same bits every time.

M is one number for all tiles, such that no term exceeds 2**100: one exp2 then serves both axes. It
will do while all sums stay above 2**-80. If one does not, or if the logits may spread too far
anyway, a flag on the device says so, and the ROBUST kernel, which is launched behind the other and
else returns at once, does the work again, relative to the largest logit of each row and column of
a tile. Nobody waits for the host. They are two kernels, and not one with a branch, because the
second needs more registers than the first can spare.

Planes: 0 sum over negatives, 1 what it is relative to (ROBUST), 2 negatives above the target;
with several positives 3 their sum, 4 what it is relative to, 5 sum of logits, 6 their number.
Counts are float32: exact up to 2**24.
"""

import triton
import triton.language as tl

from m2ae_kernels.triton._numbers import INF, LOG2E, finite_or_zero, mantissa
from m2ae_kernels.triton._tiles import entries, product, tile_at

LARGEST = tl.constexpr(180.0)  # bound on |l| up to which a common M is tried
HEADROOM = tl.constexpr(100.0)  # no term above 2**HEADROOM, so that 2**20 of them have a sum


@triton.jit
def common_reference(
    state_ptr,  # int32 [3]: bits of max |x|**2, bits of max |y|**2, whether ROBUST is needed
    scale,
    NORMALIZE: tl.constexpr,
):
    """M, an integer, and whether it may serve. |l| is at most the bound by Cauchy and Schwarz."""
    bound = tl.abs(scale) * LOG2E
    if not NORMALIZE:
        longest_x = tl.load(state_ptr).to(tl.float32, bitcast=True)
        longest_y = tl.load(state_ptr + 1).to(tl.float32, bitcast=True)
        bound = bound * tl.sqrt(longest_x) * tl.sqrt(longest_y)
    serves = bound <= LARGEST  # not if NaN
    # 0 if it can be: what is subtracted rounds.
    return tl.where(serves, tl.maximum(tl.ceil(bound) + 1 - HEADROOM, 0.0), 0.0), serves


@triton.jit
def _sum_of_exp2(logits, reference, AXIS: tl.constexpr, ROBUST: tl.constexpr):
    """Sum of exp2(logits - reference) along the axis, and the reference: if ROBUST, the maximum."""
    if ROBUST:
        reference = tl.max(logits, axis=AXIS)
        # A NaN is no maximum, but stays in the sum.
        terms = tl.exp2(logits - tl.expand_dims(finite_or_zero(reference), AXIS))
    else:
        terms = tl.exp2(logits - reference)
    return tl.sum(terms, axis=AXIS), reference


@triton.jit
def _store_planes(
    at,  # [BLOCK], where the first plane takes its numbers
    plane,  # elements of a plane
    in_range,  # [BLOCK]
    negatives,  # [BLOCK_M, BLOCK_N], logits, -inf where there is no negative
    positives,  # the same for positives
    level,  # [BLOCK], what the logits of a rank exceed
    reference,
    AXIS: tl.constexpr,
    SAME_ID: tl.constexpr,
    RANKS: tl.constexpr,
    ROBUST: tl.constexpr,
):
    sums, tops = _sum_of_exp2(negatives, reference, AXIS, ROBUST)
    tl.store(at, sums, mask=in_range)
    if ROBUST:
        tl.store(at + plane, tops, mask=in_range)
    if RANKS:
        above = (negatives > tl.expand_dims(level, AXIS)).to(tl.float32)
        tl.store(at + 2 * plane, tl.sum(above, axis=AXIS), mask=in_range)
    if SAME_ID == 2:
        sums, tops = _sum_of_exp2(positives, reference, AXIS, ROBUST)
        tl.store(at + 3 * plane, sums, mask=in_range)
        if ROBUST:
            tl.store(at + 4 * plane, tops, mask=in_range)
        shown = positives != -INF
        total = tl.sum(tl.where(shown, positives, 0.0), axis=AXIS)
        tl.store(at + 5 * plane, total, mask=in_range)
        tl.store(at + 6 * plane, tl.sum(shown.to(tl.float32), axis=AXIS), mask=in_range)


@triton.jit(do_not_specialize=["first", "rows", "M", "offset"])
def statistics_kernel(
    x,  # [N, D], pointer or descriptor
    y,  # [M, D]
    scale_ptr,  # []
    state_ptr,  # int32 [3]
    column_ptr,  # int32 [N]
    key_mask_ptr,  # int8 [M] or None
    query_ids_ptr,  # int64 [N] or None
    key_ids_ptr,  # int64 [M] or None
    rnorm_q_ptr,  # float32 [N] or None
    rnorm_k_ptr,  # float32 [M] or None
    similarity_ptr,  # float32 [N], of each row and its target; None if nobody asks for ranks
    level_k_ptr,  # float32 [M], what the logits of a column's rank exceed; or None
    row_parts_ptr,  # float32 [planes, column tiles, rows]
    column_parts_ptr,  # float32 [planes, row tiles, M]; None if not symmetric
    first,  # row of this chunk
    rows,  # in this chunk
    M,
    D,
    offset,
    SAME_ID: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr,
    DIAGONAL: tl.constexpr,  # all entries are negative, but (i, i + offset): no mask, target, ids
    ROBUST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    BY_DESCRIPTOR: tl.constexpr,
    INTERPRETED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    scale = tl.load(scale_ptr).to(tl.float32)
    reference, serves = common_reference(state_ptr, scale, rnorm_q_ptr is not None)
    if ROBUST:
        if tl.load(state_ptr + 2) == 0:
            return
    elif not serves:
        tl.store(state_ptr + 2, 1)
        return
    scale = scale * LOG2E
    tl.assume(D > 0)

    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(M, BLOCK_N)
    row_plane = column_tiles.to(tl.int64) * rows
    column_plane = row_tiles.to(tl.int64) * M
    tiles = row_tiles * column_tiles
    for index in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, column_tile = tile_at(index, row_tiles, column_tiles, GROUP)
        i0 = row_tile * BLOCK_M  # within the chunk
        j0 = column_tile * BLOCK_N
        dots = product(
            x, y, first + i0, j0, first + rows, M, D,
            BLOCK_M, BLOCK_N, BLOCK_K, BY_DESCRIPTOR, INTERPRETED, PRECISION,
        )  # fmt: skip
        i = i0 + tl.arange(0, BLOCK_M)
        j = j0 + tl.arange(0, BLOCK_N)
        in_chunk = i < rows
        in_range = j < M
        row_at = row_parts_ptr + column_tile.to(tl.int64) * rows + i
        i = first + i
        if rnorm_q_ptr is not None:
            of_row = scale * mantissa(tl.load(rnorm_q_ptr + i, mask=in_chunk, other=1.0))
            of_column = mantissa(tl.load(rnorm_k_ptr + j, mask=in_range, other=1.0))
            logits = dots * of_row[:, None] * of_column[None, :]
        else:
            logits = dots * scale

        if DIAGONAL and not ROBUST:
            terms = tl.exp2(logits - reference)
            # Most tiles lie off the diagonal and within the borders: nothing to leave out.
            start = first + i0 + offset
            crosses = (start < j0 + BLOCK_N) & (start + BLOCK_M > j0)
            if crosses | (i0 + BLOCK_M > rows) | (j0 + BLOCK_N > M):
                # Two selections, and the ends of y in j: this takes the fewest registers.
                j = tl.where(in_range, j, -1)
                terms = tl.where((i + offset)[:, None] != j[None, :], terms, 0.0)
                terms = tl.where(in_chunk[:, None] & (j >= 0)[None, :], terms, 0.0)
            tl.store(row_at, tl.sum(terms, axis=1), mask=in_chunk)
            if column_parts_ptr is not None:
                column_at = column_parts_ptr + row_tile.to(tl.int64) * M + j
                tl.store(column_at, tl.sum(terms, axis=0), mask=in_range)
        else:
            column = tl.load(column_ptr + i, mask=in_chunk, other=-2)
            positive, negative = entries(
                i, j, column, key_mask_ptr, query_ids_ptr, key_ids_ptr, M, offset,
                SAME_ID, EXCLUDE_SELF,
            )  # fmt: skip
            # Two matrices of numbers take fewer registers than one and two of truths.
            negatives = tl.where(negative, logits, -INF)
            positives = negatives
            if SAME_ID == 2:
                positives = tl.where(positive, logits, -INF)
            RANKS: tl.constexpr = similarity_ptr is not None
            level = reference
            if RANKS:
                similarity = tl.load(similarity_ptr + i, mask=in_chunk, other=0.0)
                level = tl.where(column >= 0, similarity * scale, INF)
            _store_planes(
                row_at, row_plane, in_chunk, negatives, positives, level, reference,
                1, SAME_ID, RANKS, ROBUST,
            )  # fmt: skip
            if column_parts_ptr is not None:
                if RANKS:
                    level = tl.load(level_k_ptr + j, mask=in_range, other=INF)
                column_at = column_parts_ptr + row_tile.to(tl.int64) * M + j
                _store_planes(
                    column_at, column_plane, in_range, negatives, positives, level, reference,
                    0, SAME_ID, RANKS, ROBUST,
                )  # fmt: skip
