"""GGUF: the files and block formats of llama.cpp and ggml."""

from compresskit.formats.gguf.blocks import TYPES, Blocks

__all__ = ["TYPES", "Blocks"]
