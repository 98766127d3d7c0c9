"""The Triton kernels over a matrix (N, P) of per-sample gradients. Operators in ``sample_matrix.py`` launch them.

A program reads a run of BLOCKS blocks of BLOCK_P columns, and all rows of each block, BLOCK_N at a time. It has its own
place for its sums, and ``finish_kernel`` adds the programs' sums in order: no atomics, so results are bitwise the
same from run to run. Where all rows fit one tile, it stays in registers between the column sums and the projections;
where they do not, it is read a second time, from the cache.
"""

import triton
import triton.language as tl


@triton.jit
def _tile(
    grads: tl.tensor, stride: tl.tensor, rows: tl.tensor, columns: tl.tensor, num_rows: tl.tensor, inside: tl.tensor
) -> tl.tensor:
    """Elements of these rows and columns, 0 beyond the matrix; offsets have 64 bits."""
    pointers = grads + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    return tl.load(pointers, mask=(rows < num_rows)[:, None] & inside[None, :], other=0.0)


@triton.jit
def stats_kernel(
    grads: tl.tensor,
    stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    directions: tl.tensor,
    num_terms: tl.tensor,
    mean: tl.tensor,
    squares: tl.tensor,
    partial_norms: tl.tensor,
    partial_dots: tl.tensor,
    ON_MEAN: tl.constexpr,
    SUMS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TERMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCKS: tl.constexpr,
    ONE_TILE: tl.constexpr,
) -> None:
    """mean[j] = sum_i g_ij / N and, if DIAGONAL, squares[j] = sum_i g_ij^2 / N, if SUMS; and this program's share of
    |g_i|^2 in partial_norms[i, program] and of g_i . w_k in partial_dots[i, k, program], where w is the mean or one of
    num_terms <= TERMS directions."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    term = tl.arange(0, TERMS)
    first = program * (BLOCKS * BLOCK_P)
    if ONE_TILE:
        rows = tl.arange(0, BLOCK_N)
        norms = tl.zeros([BLOCK_N], tl.float64)
        dots = tl.zeros([BLOCK_N, TERMS], tl.float64)
        for block in range(BLOCKS):
            columns = first + block * BLOCK_P + tl.arange(0, BLOCK_P)
            inside = columns < num_columns
            values = _tile(grads, stride, rows, columns, num_rows, inside).to(tl.float64)
            average = (tl.sum(values, axis=0) / num_rows).to(mean.dtype.element_ty)
            if SUMS:
                tl.store(mean + columns, average, mask=inside)
                norms += tl.sum(values * values, axis=1)
                if DIAGONAL:
                    tl.store(squares + columns, tl.sum(values * values, axis=0) / num_rows, mask=inside)
            if ON_MEAN:
                dots += tl.sum(values * average.to(tl.float64)[None, :], axis=1)[:, None]
            else:
                direction = directions + columns
                for k in range(num_terms):
                    u = tl.load(direction, mask=inside, other=0.0)
                    direction += num_columns
                    share = tl.sum(values * u.to(tl.float64)[None, :], axis=1)
                    dots += tl.where(term[None, :] == k, share[:, None], 0.0)
        if SUMS:
            tl.store(partial_norms + rows.to(tl.int64) * programs + program, norms, mask=rows < num_rows)
        index = rows.to(tl.int64)[:, None] * num_terms + term[None, :]
        stored = (rows < num_rows)[:, None] & (term < num_terms)[None, :]
        tl.store(partial_dots + index * programs + program, dots, mask=stored)
    else:  # BLOCKS is 1
        columns = first + tl.arange(0, BLOCK_P)
        inside = columns < num_columns
        total = tl.zeros([BLOCK_P], tl.float64)
        total_squares = tl.zeros([BLOCK_P], tl.float64)
        if SUMS:
            for begin in range(0, num_rows, BLOCK_N):
                values = _tile(grads, stride, begin + tl.arange(0, BLOCK_N), columns, num_rows, inside).to(tl.float64)
                total += tl.sum(values, axis=0)
                total_squares += tl.sum(values * values, axis=0)
            tl.store(mean + columns, total / num_rows, mask=inside)
            if DIAGONAL:
                tl.store(squares + columns, total_squares / num_rows, mask=inside)
        average = (total / num_rows).to(mean.dtype.element_ty).to(tl.float64)
        for begin in range(0, num_rows, BLOCK_N):
            rows = begin + tl.arange(0, BLOCK_N)
            values = _tile(grads, stride, rows, columns, num_rows, inside).to(tl.float64)
            place = rows.to(tl.int64)
            if SUMS:
                norms = tl.sum(values * values, axis=1)
                tl.store(partial_norms + place * programs + program, norms, mask=rows < num_rows)
            if ON_MEAN:
                share = tl.sum(values * average[None, :], axis=1)
                tl.store(partial_dots + place * programs + program, share, mask=rows < num_rows)
            else:
                direction = directions + columns
                for k in range(num_terms):
                    u = tl.load(direction, mask=inside, other=0.0)
                    direction += num_columns
                    share = tl.sum(values * u.to(tl.float64)[None, :], axis=1)
                    index = place * num_terms + k
                    tl.store(partial_dots + index * programs + program, share, mask=rows < num_rows)


@triton.jit
def gram_kernel(
    grads: tl.tensor,
    stride: tl.tensor,
    num_rows: tl.tensor,
    num_columns: tl.tensor,
    programs: tl.tensor,
    partial: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    """partial[i, j, program] = this program's share of g_i . g_j, for one pair of groups of BLOCK_N rows.

    Tensor cores add RUN blocks of BLOCK_P columns in float32, and RUNS such sums are added in float64. Programs of one
    run of columns are neighbours, so that they read it from the cache.
    """
    groups = tl.cdiv(num_rows, BLOCK_N)
    pair = tl.program_id(0) % (groups * groups)
    program = (tl.program_id(0) // (groups * groups)).to(tl.int64)
    left = pair // groups * BLOCK_N + tl.arange(0, BLOCK_N)
    right = pair % groups * BLOCK_N + tl.arange(0, BLOCK_N)
    if pair // groups >= pair % groups:  # the rest is its mirror image
        total = tl.zeros([BLOCK_N, BLOCK_N], tl.float64)
        first = program * (RUNS * RUN * BLOCK_P)
        runs = tl.minimum(tl.cdiv(num_columns - first, RUN * BLOCK_P), RUNS)
        for run in range(runs):
            if grads.dtype.element_ty == tl.float64:
                accumulated = tl.zeros([BLOCK_N, BLOCK_N], tl.float64)
            else:
                accumulated = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
            for block in range(RUN):
                columns = first + (run * RUN + block) * BLOCK_P + tl.arange(0, BLOCK_P)
                inside = columns < num_columns
                a = _tile(grads, stride, left, columns, num_rows, inside)
                b = _tile(grads, stride, right, columns, num_rows, inside)
                accumulated = tl.dot(
                    a, tl.trans(b), accumulated, input_precision=PRECISION, out_dtype=accumulated.dtype
                )
            total += accumulated.to(tl.float64)
        index = left.to(tl.int64)[:, None] * num_rows + right[None, :]
        stored = (left < num_rows)[:, None] & (right < num_rows)[None, :]
        tl.store(partial + index * programs + program, total, mask=stored)
