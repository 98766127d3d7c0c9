"""The operators over a matrix of per-sample gradients, in Triton. ``reference.py`` defines them.
Grids depend on the matrix's shape alone, so results do not depend on the GPU's size."""

import torch
from torch import Tensor

from ..reference import mean_dtype
from . import sample_matrix_kernels
from .chunks import NUM_WARPS
from .reductions import finish
from .tables import DTYPES, check

TILE = 4096  # elements of a tile: 16 for each of 256 threads
ROWS = 256  # at most, in a tile
COLUMNS = 1024  # at least, of a program whose rows fit one tile: partial sums cost 1/512 of the matrix
TERMS = 16  # directions that are projected on in one read
GROUP = 64  # rows of the Gram matrix that a program takes on either side


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _matrix(grads: Tensor) -> Tensor:
    """``grads``, or a copy where its columns are not adjacent."""
    check(grads.dim() == 2 and grads.shape[0] > 0, "expected an (N, P) matrix with N > 0")
    check(grads.dtype in DTYPES, "expected float32, float64, bfloat16 or float16 tensors")
    return grads if grads.shape[1] < 2 or grads.stride(1) == 1 else grads.contiguous()


def stats_constants(num_rows: int) -> dict[str, int | bool]:
    """Tiles of ``stats_kernel`` for a matrix of N rows."""
    one_tile = num_rows <= ROWS
    block_n = _next_power_of_2(num_rows) if one_tile else ROWS
    block_p = min(TILE // block_n, 1024)
    blocks = max(1, COLUMNS // block_p) if one_tile else 1
    return {"BLOCK_N": block_n, "BLOCK_P": block_p, "BLOCKS": blocks, "ONE_TILE": one_tile}


def sample_gradient_stats(grads: Tensor, directions: Tensor | None, diagonal: bool) -> list[Tensor]:
    with torch.cuda.device_of(grads):
        matrix = _matrix(grads)
        num_rows, num_columns = matrix.shape
        dtype = mean_dtype(grads.dtype)
        num_terms = 1 if directions is None else len(directions)
        if directions is not None:
            check(
                directions.dim() == 2
                and directions.shape[1] == num_columns
                and directions.dtype == dtype
                and directions.device == grads.device,
                "expected (K, P) directions of the mean's dtype on the device of the gradients",
            )
            directions = directions.contiguous()
        constants = stats_constants(num_rows)
        programs = -(-num_columns // (constants["BLOCK_P"] * constants["BLOCKS"]))
        mean = grads.new_empty(num_columns, dtype=dtype)
        squares = grads.new_empty(num_columns if diagonal else 0, dtype=dtype)
        sq_norms = grads.new_empty(num_rows, dtype=torch.float64)
        norms = grads.new_empty(num_rows, programs, dtype=torch.float64)
        parts = []
        for first in range(0, max(num_terms, 1), TERMS):
            terms = min(TERMS, num_terms - first)
            dots = grads.new_empty(num_rows, terms, programs, dtype=torch.float64)
            if programs > 0:
                sample_matrix_kernels.stats_kernel[(programs,)](
                    matrix,
                    matrix.stride(0),
                    num_rows,
                    num_columns,
                    mean if directions is None else directions[first : first + terms],
                    terms,
                    mean,
                    squares,
                    norms,
                    dots,
                    ON_MEAN=directions is None,
                    SUMS=first == 0,
                    DIAGONAL=diagonal,
                    TERMS=_next_power_of_2(terms),
                    **constants,
                    num_warps=NUM_WARPS,
                )
            parts.append(finish(dots, grads.new_empty(num_rows, terms, dtype=torch.float64)))
        finish(norms, sq_norms)
        projections = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        results = [mean, sq_norms, projections.squeeze(1) if directions is None else projections]
        return [*results, squares] if diagonal else results


def gram_constants(num_rows: int, dtype: torch.dtype, hip: bool) -> dict[str, int | str]:
    """Tiles and precision of ``gram_kernel``. On tensor cores, three TF32 products make one of float32."""
    group = min(GROUP, max(16, _next_power_of_2(num_rows)))
    if dtype == torch.float64:
        return {"BLOCK_N": min(group, 32), "BLOCK_P": 16, "RUN": 16, "RUNS": 16, "PRECISION": "ieee"}
    if dtype == torch.float32:
        return {"BLOCK_N": group, "BLOCK_P": 32, "RUN": 8, "RUNS": 32, "PRECISION": "ieee" if hip else "tf32x3"}
    return {"BLOCK_N": group, "BLOCK_P": 64, "RUN": 4, "RUNS": 32, "PRECISION": "ieee"}


def gram_warps(constants: dict[str, int | str]) -> int:
    """With 4 warps, a tile of 64 by 64 in float64 and its products fill the registers of an H100."""
    return 8 if constants["BLOCK_N"] == 64 else 4


def sample_gram(grads: Tensor) -> Tensor:
    with torch.cuda.device_of(grads):
        matrix = _matrix(grads)
        if matrix.device.type == "cpu" and matrix.dtype == torch.bfloat16:
            matrix = matrix.float()  # the interpreter multiplies the bits of bfloat16 numbers
        num_rows, num_columns = matrix.shape
        constants = gram_constants(num_rows, matrix.dtype, torch.version.hip is not None)
        programs = -(-num_columns // (int(constants["BLOCK_P"]) * int(constants["RUN"]) * int(constants["RUNS"])))
        groups = -(-num_rows // int(constants["BLOCK_N"]))
        partial = grads.new_empty(num_rows, num_rows, programs, dtype=torch.float64)
        if programs > 0:
            sample_matrix_kernels.gram_kernel[(groups * groups * programs,)](
                matrix,
                matrix.stride(0),
                num_rows,
                num_columns,
                programs,
                partial,
                **constants,
                num_warps=gram_warps(constants),
            )
        result = partial.sum(-1)
        return torch.tril(result) + torch.tril(result, -1).T
