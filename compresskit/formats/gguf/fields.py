"""Fields of 1, 2 or 4 bits as block formats lay them out: in runs, not one beside the next.

A run of bytes holds, in its lowest bits, the fields of the next weights; in the bits above, those
of the weights that follow; and so on. So one shift and one mask of whole registers split a run.
"""

import torch
from torch import Tensor


def split(stored: Tensor, width: int, run: int) -> Tensor:
    """(blocks, n) bytes -> (blocks, 8 n / width) fields of `width` bits.

    Parameters
    ----------
    stored : (blocks, n) tensor, uint8
    width : int
        1, 2 or 4
    run : int
        a divisor of n: bytes whose lowest bits are consecutive weights

    Examples
    --------
    >>> split(torch.tensor([[0x21, 0x43]], dtype=torch.uint8), 4, 2)
    tensor([[1, 3, 2, 4]], dtype=torch.uint8)
    """
    blocks, n = stored.shape
    runs = stored.reshape(blocks, n // run, run)
    out = torch.empty((blocks, n // run, 8 // width, run), dtype=torch.uint8, device=stored.device)
    for i in range(8 // width):
        torch.bitwise_right_shift(runs, i * width, out=out[:, :, i])
    return out.bitwise_and_((1 << width) - 1).reshape(blocks, -1)


def packed(values: Tensor, width: int, run: int) -> Tensor:
    """(blocks, m) fields of `width` bits -> (blocks, width m / 8) bytes: the inverse of `split`.

    Bits of the values above the lowest `width` are dropped.

    Parameters
    ----------
    values : (blocks, m) tensor, uint8
    width : int
        1, 2 or 4
    run : int
        as of `split`
    """
    blocks, m = values.shape
    planes = values.reshape(blocks, m * width // (8 * run), 8 // width, run) & ((1 << width) - 1)
    out = planes[:, :, 0].clone()
    for i in range(1, 8 // width):
        out |= planes[:, :, i] << (i * width)
    return out.reshape(blocks, -1)
