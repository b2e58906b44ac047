"""From sums over tiles to the statistics of info_nce_loss, in the order of the tiles; in Triton."""

import triton
import triton.language as tl

from m2ae_kernels.triton._info_nce_loss_statistics import common_reference
from m2ae_kernels.triton._numbers import INF, LN2, LOG2E, finite_or_zero, log1p_exp, log_of
from m2ae_kernels.triton._rows import queries_of_columns
from m2ae_kernels.triton._tiles import sum_over_tiles

SMALLEST = tl.constexpr(2.0**-80)  # terms below 2**-126 are lost: 2**20 of them are 2**-26 of this


@triton.jit(do_not_specialize=["N", "M", "offset"])
def targets_of_columns_kernel(
    similarity_ptr,  # float32 [N], of each row and its target
    column_ptr,  # int32 [N]
    starts_ptr,  # int64 [M + 1], a column's queries in `order`; None: the target is i + offset
    order_ptr,  # int64 [N]
    scale_ptr,  # []
    out_ptr,  # float32 [4, M]: largest logit to base 2; log-sum-exp, sum, number of the logits
    N,
    M,
    offset,
    BLOCK_J: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    # One program owns BLOCK_J columns, and goes through the queries of each BLOCK_Q at a time.
    j = tl.program_id(0) * BLOCK_J + tl.arange(0, BLOCK_J)
    in_range = j < M
    scale = tl.load(scale_ptr).to(tl.float32)
    begin, end = queries_of_columns(j, in_range, column_ptr, starts_ptr, N, offset)
    top = tl.full([BLOCK_J], -INF, tl.float32)
    total = tl.zeros([BLOCK_J], tl.float32)
    logits = tl.zeros([BLOCK_J], tl.float32)
    for start in range(0, tl.max(end - begin, axis=0), BLOCK_Q):
        query = begin[:, None] + (start + tl.arange(0, BLOCK_Q))[None, :]
        inside = query < end[:, None]
        if order_ptr is not None:
            query = tl.load(order_ptr + query, mask=inside, other=0)
        similarity = tl.load(similarity_ptr + query, mask=inside, other=0.0)
        logits += tl.sum(similarity * scale, axis=1)
        logit = tl.where(inside, similarity * (scale * LOG2E), -INF)  # as tiles have them
        higher = tl.maximum(top, tl.max(logit, axis=1))
        base = finite_or_zero(higher)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(logit - base[:, None]), axis=1)
        top = higher
    at = out_ptr + j
    plane = M.to(tl.int64)
    number = (end - begin).to(tl.float32)
    log_sum = log_of(total, finite_or_zero(top)).to(tl.float32)
    # One logit is its own log-sum-exp, to the last bit.
    tl.store(at, tl.where(number > 0, top, INF), mask=in_range)
    tl.store(at + plane, tl.where(number == 1, logits, log_sum), mask=in_range)
    tl.store(at + 2 * plane, logits, mask=in_range)
    tl.store(at + 3 * plane, number, mask=in_range)


@triton.jit
def _sum_tiles(
    parts_ptr,  # [tiles, width], of the plane of the sums; that of their references follows
    tiles,
    width,
    lane,
    in_range,
    reference,
    robust,  # whether sums have references of their own, not the common one
    top,  # of what was summed before
    total,
    TILES: tl.constexpr,
):
    """(top, total): with the tiles' added, all sums are 2**top total."""
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & in_range[None, :]
        at = parts_ptr + tile.to(tl.int64)[:, None] * width + lane[None, :]
        sums = tl.load(at, mask=inside, other=0.0)
        plane = tiles.to(tl.int64) * width
        # Not `inside & robust`: Triton 3.9's interpreter makes integers of a block & a scalar.
        has_top = (tile < tl.where(robust, tiles, 0))[:, None] & in_range[None, :]
        tops = tl.load(at + plane, mask=has_top, other=reference)
        tops = tl.where(inside, tops, -INF)
        higher = tl.maximum(top, tl.max(tops, axis=0))
        base = finite_or_zero(higher)
        total = total * tl.exp2(top - base)
        total += tl.sum(sums * tl.exp2(tops - base[None, :]), axis=0)
        top = higher
    return top, total


@triton.jit
def _is_lost(parts_ptr, tiles, width, lane, present, SAME_ID: tl.constexpr, TILES: tl.constexpr):
    """Whether a sum relative to the common reference came out too small to be right."""
    plane = tiles.to(tl.int64) * width
    negatives = tl.zeros(lane.shape, tl.float32)
    positives = tl.zeros(lane.shape, tl.float32)
    number = tl.zeros(lane.shape, tl.float32)
    # One loop for all three: of three loops in a row, Triton 3.6 makes invalid code.
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        inside = (tile < tiles)[:, None] & present[None, :]
        at = parts_ptr + tile.to(tl.int64)[:, None] * width + lane[None, :]
        negatives += tl.sum(tl.load(at, mask=inside, other=0.0), axis=0)
        if SAME_ID == 2:
            positives += tl.sum(tl.load(at + 3 * plane, mask=inside, other=0.0), axis=0)
            number += tl.sum(tl.load(at + 6 * plane, mask=inside, other=0.0), axis=0)
    lost = (negatives < SMALLEST) | ((number > 0) & (positives < SMALLEST))
    return tl.max((present & lost).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["first", "rows", "M", "row_tiles", "column_tiles"])
def check_kernel(
    row_parts_ptr,  # float32 [planes, column tiles, rows]
    column_parts_ptr,  # float32 [planes, row tiles, M] or None
    state_ptr,  # int32 [3], the last: whether ROBUST is needed
    column_ptr,  # int32 [N]
    key_mask_ptr,  # int8 [M] or None
    first,
    rows,
    M,
    row_tiles,
    column_tiles,
    SAME_ID: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    # One program owns BLOCK rows or columns. A row without any negative counts as lost, too: it is
    # rare, and only costs time.
    block = tl.program_id(0)
    blocks_of_rows = tl.cdiv(rows, BLOCK)
    if tl.load(state_ptr + 2) != 0:
        return
    if block < blocks_of_rows:
        lane = block * BLOCK + tl.arange(0, BLOCK)
        present = tl.load(column_ptr + first + lane, mask=lane < rows, other=-2) > -2
        lost = _is_lost(row_parts_ptr, column_tiles, rows, lane, present, SAME_ID, TILES)
        if lost != 0:
            tl.store(state_ptr + 2, 1)
    elif column_parts_ptr is not None:
        lane = (block - blocks_of_rows) * BLOCK + tl.arange(0, BLOCK)
        present = lane < M
        if key_mask_ptr is not None:
            present = tl.load(key_mask_ptr + lane, mask=present, other=0) != 0
        lost = _is_lost(column_parts_ptr, row_tiles, M, lane, present, SAME_ID, TILES)
        if lost != 0:
            tl.store(state_ptr + 2, 1)


@triton.jit
def _store_statistics(
    loss_ptr,
    neg_ptr,
    pos_ptr,
    num_ptr,
    at,
    in_range,
    log_negatives,  # log-sum-exp, float64
    log_positives,  # the same, float32
    mean,  # of the positives' logits
    number,  # of positives
):
    in_loss = number > 0
    log_positives = tl.where(in_loss, log_positives, 0.0)
    neg = (log_negatives - log_positives.to(tl.float64)).to(tl.float32)
    excess = tl.where(number > 1, log_positives - mean, 0.0)
    tl.store(loss_ptr + at, tl.where(in_loss, log1p_exp(neg) + excess, 0.0), mask=in_range)
    tl.store(neg_ptr + at, neg, mask=in_range)
    tl.store(pos_ptr + at, log_positives, mask=in_range)
    tl.store(num_ptr + at, number, mask=in_range)


@triton.jit
def _positives(top, total, logits, number):
    """Log-sum-exp and mean of several positives. That of one is its logit, to the last bit."""
    mean = logits / tl.maximum(number, 1.0) * LN2
    log_sum = log_of(total, finite_or_zero(top)).to(tl.float32)
    return tl.where(number == 1, mean, log_sum), mean


@triton.jit(do_not_specialize=["first", "rows", "N", "M", "row_tiles", "column_tiles", "ignore"])
def fold_kernel(
    row_parts_ptr,  # float32 [planes, column tiles, rows]
    column_parts_ptr,  # float32 [planes, row tiles, M] or None
    carried_ptr,  # float32 [planes, M]: sums over the chunks before; or None
    state_ptr,  # int32 [3]
    scale_ptr,  # []
    column_ptr,  # int32 [N]
    similarity_ptr,  # float32 [N]
    targets_ptr,  # float32 [4, M], of targets_of_columns_kernel; or None
    target_ptr,  # int64 [N] or None
    loss_q_ptr, neg_q_ptr, pos_q_ptr, num_q_ptr,  # out, float32 [N] each
    loss_k_ptr, neg_k_ptr, pos_k_ptr, num_k_ptr,  # out, float32 [M] each, or None
    rank_q_ptr,  # out, int64 [N], or None
    rank_k_ptr,  # out, int64 [M], or None
    first,
    rows,
    N,
    M,
    row_tiles,
    column_tiles,
    ignore,  # target of a row that is not in the loss
    NORMALIZE: tl.constexpr,
    SAME_ID: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    # One program owns BLOCK rows of the chunk, whose statistics are complete, or BLOCK columns,
    # whose sums go from chunk to chunk.
    block = tl.program_id(0)
    blocks_of_rows = tl.cdiv(rows, BLOCK)
    scale = tl.load(scale_ptr).to(tl.float32)
    reference, _ = common_reference(state_ptr, scale, NORMALIZE)
    robust = tl.load(state_ptr + 2) != 0
    zero = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], -INF, tl.float32)
    if block < blocks_of_rows:
        lane = block * BLOCK + tl.arange(0, BLOCK)
        in_range = lane < rows
        i = first + lane
        plane = column_tiles.to(tl.int64) * rows
        column = tl.load(column_ptr + i, mask=in_range, other=-2)
        top, total = _sum_tiles(
            row_parts_ptr, column_tiles, rows, lane, in_range, reference, robust, lowest, zero,
            TILES,
        )  # fmt: skip
        if SAME_ID == 2:
            at = row_parts_ptr + 3 * plane
            pos_top, pos_total = _sum_tiles(
                at, column_tiles, rows, lane, in_range, reference, robust, lowest, zero, TILES
            )
            at += 2 * plane
            logits = sum_over_tiles(at, column_tiles, rows, lane, in_range, zero, TILES)
            at += plane
            number = sum_over_tiles(at, column_tiles, rows, lane, in_range, zero, TILES)
            log_positives, mean = _positives(pos_top, pos_total, logits, number)
            if target_ptr is not None:
                target = tl.load(target_ptr + i, mask=in_range, other=0)
                number = tl.where(target == ignore, 0.0, number)
        else:
            number = (column >= 0).to(tl.float32)
            mean = scale * tl.load(similarity_ptr + i, mask=in_range, other=0.0)
            log_positives = mean
        log_negatives = log_of(total, finite_or_zero(top))
        _store_statistics(
            loss_q_ptr, neg_q_ptr, pos_q_ptr, num_q_ptr, i, in_range,
            log_negatives, log_positives, mean, number,
        )  # fmt: skip
        if rank_q_ptr is not None:
            at = row_parts_ptr + 2 * plane
            rank = sum_over_tiles(at, column_tiles, rows, lane, in_range, zero, TILES).to(tl.int64)
            tl.store(rank_q_ptr + i, tl.where(column >= 0, rank, M), mask=in_range)
    elif column_parts_ptr is not None:
        lane = (block - blocks_of_rows) * BLOCK + tl.arange(0, BLOCK)
        in_range = lane < M
        plane = row_tiles.to(tl.int64) * M
        is_last = first + rows >= N
        carried = carried_ptr + lane
        step = M.to(tl.int64)
        again = lane < tl.where(first > 0, M, 0)
        top = tl.load(carried + step, mask=again, other=-INF)
        total = tl.load(carried, mask=again, other=0.0)
        top, total = _sum_tiles(
            column_parts_ptr, row_tiles, M, lane, in_range, reference, robust, top, total, TILES
        )
        tl.store(carried, total, mask=in_range)
        tl.store(carried + step, top, mask=in_range)
        if SAME_ID == 2:
            at = column_parts_ptr + 3 * plane
            pos_top = tl.load(carried + 4 * step, mask=again, other=-INF)
            pos_total = tl.load(carried + 3 * step, mask=again, other=0.0)
            logits = tl.load(carried + 5 * step, mask=again, other=0.0)
            number = tl.load(carried + 6 * step, mask=again, other=0.0)
            pos_top, pos_total = _sum_tiles(
                at, row_tiles, M, lane, in_range, reference, robust, pos_top, pos_total, TILES
            )
            at += 2 * plane
            logits = sum_over_tiles(at, row_tiles, M, lane, in_range, logits, TILES)
            at += plane
            number = sum_over_tiles(at, row_tiles, M, lane, in_range, number, TILES)
            tl.store(carried + 3 * step, pos_total, mask=in_range)
            tl.store(carried + 4 * step, pos_top, mask=in_range)
            tl.store(carried + 5 * step, logits, mask=in_range)
            tl.store(carried + 6 * step, number, mask=in_range)
            log_positives, mean = _positives(pos_top, pos_total, logits, number)
        else:
            log_positives = tl.load(targets_ptr + step + lane, mask=in_range, other=0.0)
            number = tl.load(targets_ptr + 3 * step + lane, mask=in_range, other=0.0)
            mean = tl.load(targets_ptr + 2 * step + lane, mask=in_range, other=0.0)
            mean = mean / tl.maximum(number, 1.0)
        if is_last:
            log_negatives = log_of(total, finite_or_zero(top))
            _store_statistics(
                loss_k_ptr, neg_k_ptr, pos_k_ptr, num_k_ptr, lane, in_range,
                log_negatives, log_positives, mean, number,
            )  # fmt: skip
        if rank_k_ptr is not None:
            at = column_parts_ptr + 2 * plane
            rank = tl.load(carried + 2 * step, mask=again, other=0.0)
            rank = sum_over_tiles(at, row_tiles, M, lane, in_range, rank, TILES)
            tl.store(carried + 2 * step, rank, mask=in_range)
            targets = tl.load(targets_ptr + 3 * step + lane, mask=in_range, other=0.0)
            rank = tl.where(targets > 0, rank.to(tl.int64), N)
            tl.store(rank_k_ptr + lane, rank, mask=in_range)
