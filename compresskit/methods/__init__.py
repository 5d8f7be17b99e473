"""Methods that turn one weight matrix into a code: (weight, stats, *, options) -> Code."""

from compresskit.methods.gptq import gptq
from compresskit.methods.int8 import int8
from compresskit.methods.llm_int8 import llm_int8
from compresskit.methods.round_to_nearest import round_to_nearest

__all__ = ["gptq", "int8", "llm_int8", "round_to_nearest"]
