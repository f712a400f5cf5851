"""Products of large matrices, where nearly all of a calibrated method's time goes."""

from torch import Tensor

ROWS = 1024  # of the result computed at a time: what lies between stays in the cache


def add_product(to: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, fast: bool = False) -> None:
    """to [M, N] += alpha · a [M, L] b [L, N], in place, all float32.

    fast: multiply in bfloat16, two to four times as fast on processors that can. Every factor and every product is then
    off by up to 1 part in 256, at random. That is for corrections, which are small beside what they correct.
    """
    if not fast:
        to.addmm_(a, b, alpha=alpha)
        return
    b = b.bfloat16()
    for rows in range(0, len(to), ROWS):
        here = slice(rows, rows + ROWS)
        to[here].add_(a[here].bfloat16() @ b, alpha=alpha)
