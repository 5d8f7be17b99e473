"""Write entropy.npz: symbol streams and BF16 weights, and what other coders made of them.

    python tests/data/make_entropy_references.py FOLDER

FOLDER holds entropy.npz, dfloat11_w.npz and manifest.json: streams with the bits that constriction
0.5.0 (ANS and range coder, static model), an optimal Huffman code and the entropy take, and weights
with the exponent stream of DFloat11 0.5.0 (its compressor, 8 bytes a thread, 512 threads a block).
"""

import json
import sys
from pathlib import Path

import numpy as np

source = Path(sys.argv[1])
manifest = json.loads((source / "manifest.json").read_text())
streams = np.load(source / "entropy.npz")
out = {f"stream/{name}": streams[name] for name in streams.files}
for name, report in manifest["entropy"]["report"].items():
    out[f"report/{name}"] = np.array(json.dumps(report))
weights = np.load(source / "dfloat11_w.npz")
out |= {"dfloat11/weights": weights["weights"]}
out["dfloat11/encoded"] = np.array(len(weights["encoded"]))
out["dfloat11/report"] = np.array(json.dumps(manifest["dfloat11_w"]["report"]))
np.savez_compressed(Path(__file__).parent / "entropy.npz", **out)
