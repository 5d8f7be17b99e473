"""What bitsandbytes 0.50.2 computes on a CPU: makes bitsandbytes.npz.

Run in an environment of its own, since the book itself does not need bitsandbytes:

    pip install torch bitsandbytes==0.50.2
    python make_bitsandbytes_references.py

The weights are exact in float16; bfloat16 results are stored as their bits. A packed byte holds
the earlier index in its high half.
"""

from pathlib import Path

import numpy as np
import torch
from bitsandbytes import functional

BLOCK = 64
generator = torch.Generator().manual_seed(0)
weight = torch.randn(64, 512, generator=generator) * 0.03
weight *= torch.rand(512, generator=generator) + 0.5
weight.view(-1)[torch.randperm(weight.numel(), generator=generator)[:40]] *= 12  # outliers
weight = weight.half().float()
zeros = torch.zeros(4, BLOCK)
zeros[1, 3], zeros[2] = 1e-3, -2.5

found = {"weight": weight.half(), "zeros": zeros, "dynamic8": functional.create_dynamic_map()}
found["dynamic8 unsigned"] = functional.create_dynamic_map(signed=False)
inputs = {
    "float32": weight,
    "bfloat16": weight.bfloat16(),
    "ragged": weight.flatten()[None, :1000],
    "zeros": zeros,
}
for table in ("nf4", "fp4"):
    for name, x in inputs.items():
        packed, state = functional.quantize_4bit(x, blocksize=BLOCK, quant_type=table)
        decoded = functional.dequantize_4bit(packed, state)[:8]
        found |= {
            f"{table}_{name}_packed": packed.flatten(),
            f"{table}_{name}_scale": state.absmax,
            f"{table}_{name}_decoded": decoded.view(torch.int16)
            if decoded.dtype == torch.bfloat16
            else decoded,
        }
    found[table] = state.code[:16]
    packed, _ = functional.quantize_4bit(weight, blocksize=128, quant_type=table)
    found[f"{table}_128_packed"] = packed.flatten()
    packed, state = functional.quantize_4bit(
        weight, blocksize=BLOCK, quant_type=table, compress_statistics=True
    )
    found |= {
        f"{table}_double_index": state.absmax,
        f"{table}_double_scale": state.state2.absmax,
        f"{table}_double_offset": state.offset,
        f"{table}_double_decoded": functional.dequantize_4bit(packed, state)[:8],
    }
arrays = {name: tensor.numpy() for name, tensor in found.items()}
np.savez_compressed(Path(__file__).with_name("bitsandbytes.npz"), **arrays)
