"""Entropy coders: whole numbers at the price of their surprise, tables and headers counted.

A coder makes a leaf of any whole numbers: `huffman` and `rans` from their frequencies, `rans` with
`Scales` from a law whose scale rows and columns give, `adaptive` from what went before. `coded`
rewrites the leaves of a whole code.
"""

from collections.abc import Callable

from compresskit.code import Array, Code, Leaf
from compresskit.entropy.ans import Rans, Scales, rans
from compresskit.entropy.prefix_codes import Huffman, canonical, huffman, lengths
from compresskit.entropy.range_coder import Adaptive, adaptive
from compresskit.entropy.symbols import Stream

__all__ = [
    "Adaptive",
    "Huffman",
    "Rans",
    "Scales",
    "adaptive",
    "canonical",
    "coded",
    "huffman",
    "lengths",
    "rans",
]


def coded(code: Code, coder: Callable[[Leaf], Leaf] = rans) -> Code:
    """The same code with its whole numbers entropy-coded, wherever that makes a leaf smaller.

    Parameters
    ----------
    code : Code
    coder : callable
        `rans`, `huffman`, `adaptive`, or `rans` with a model bound by `functools.partial`

    Returns
    -------
    Code
        that decodes to the same tensor, at every use; one that multiplies whole numbers as they
        lie in memory (`Code.quantizes_inputs`) stays as it is
    """
    if code.quantizes_inputs:
        return code

    def rewritten(path: str, leaf: Leaf) -> Leaf:
        if isinstance(leaf, Array | Stream) or leaf.decode().is_floating_point():
            return leaf
        smaller = coder(leaf)
        return smaller if smaller.nbytes < leaf.nbytes else leaf

    return code.map(rewritten)
