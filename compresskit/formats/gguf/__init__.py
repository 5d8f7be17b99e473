"""GGUF: the files and block formats of llama.cpp and ggml."""

from compresskit.formats.gguf.blocks import TYPES, Blocks
from compresskit.formats.gguf.mixes import FILE_TYPES, q4_k_m
from compresskit.formats.gguf.quantizers import FALLBACK, quantize
from compresskit.formats.gguf.reader import File, GGUFError, read
from compresskit.formats.gguf.writer import write

__all__ = [
    "FALLBACK",
    "FILE_TYPES",
    "TYPES",
    "Blocks",
    "File",
    "GGUFError",
    "q4_k_m",
    "quantize",
    "read",
    "write",
]
