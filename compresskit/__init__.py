"""compresskit: the methods of the book, each once, in its final form.

A compressed weight is a tree (`compresskit.code.Code`): inner nodes are formulas, leaves are bytes.
Read the modules in the order of the book: `bits`, `theory`, `code`, `linalg`, `affine`, `stats`,
`methods`, `layers`, `model`, `container`, `measure`.
"""

__version__ = "0.1.0"
