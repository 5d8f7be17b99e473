"""Methods that turn one weight matrix into a code: (weight, stats, *, options) -> Code."""

from compresskit.methods.awq import awq
from compresskit.methods.block_format import block_format
from compresskit.methods.entropy_gptq import entropy_gptq
from compresskit.methods.fp4 import fp4
from compresskit.methods.gptq import gptq
from compresskit.methods.hadamard import hadamard
from compresskit.methods.int8 import int8
from compresskit.methods.kmeans import kmeans
from compresskit.methods.llm_int8 import llm_int8
from compresskit.methods.lloyd_max import lloyd_max
from compresskit.methods.magnitude import magnitude
from compresskit.methods.masked import masked
from compresskit.methods.nf4 import nf4
from compresskit.methods.obq import obq
from compresskit.methods.obs import obs
from compresskit.methods.random import random
from compresskit.methods.randomized_svd import randomized_svd
from compresskit.methods.residual import residual
from compresskit.methods.round_to_nearest import round_to_nearest
from compresskit.methods.sign import sign
from compresskit.methods.smooth import smooth
from compresskit.methods.sparsegpt import sparsegpt
from compresskit.methods.svd import svd
from compresskit.methods.ternary import ternary
from compresskit.methods.wanda import wanda
from compresskit.methods.water_filling_gptq import water_filling_gptq
from compresskit.methods.whitened_svd import whitened_svd

__all__ = [
    "awq",
    "block_format",
    "entropy_gptq",
    "fp4",
    "gptq",
    "hadamard",
    "int8",
    "kmeans",
    "llm_int8",
    "lloyd_max",
    "magnitude",
    "masked",
    "nf4",
    "obq",
    "obs",
    "random",
    "randomized_svd",
    "residual",
    "round_to_nearest",
    "sign",
    "smooth",
    "sparsegpt",
    "svd",
    "ternary",
    "wanda",
    "water_filling_gptq",
    "whitened_svd",
]
