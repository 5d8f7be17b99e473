"""GGUF: the files and block formats of llama.cpp and ggml."""

from compresskit.formats.gguf.blocks import TYPES, Blocks
from compresskit.formats.gguf.reader import File, GGUFError, read
from compresskit.formats.gguf.writer import write

__all__ = ["TYPES", "Blocks", "File", "GGUFError", "read", "write"]
