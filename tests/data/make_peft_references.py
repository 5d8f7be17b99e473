"""What PEFT makes of a small network with adapters: the folders in peft/.

    python make_peft_references.py    (with peft 0.21.2 and what it needs, beside torch)

Each folder holds what `save_pretrained` writes, and reference.safetensors: the base's parameters,
inputs x, outputs y, the gradients of mean(y^2), and the merged parameters. The layer "block.v"
has a rank and an alpha of its own.
"""

import shutil
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import nn

KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 20)
        self.block = nn.ModuleDict({"q": nn.Linear(20, 20), "v": nn.Linear(20, 8, bias=False)})

    def forward(self, x):
        return self.block["v"](self.block["q"](self.first(x).tanh()).tanh())


def make(kind: str, folder: Path) -> None:
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 12)
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q", "v"],
        rank_pattern={"v": 2}, alpha_pattern={"v": 7}, **KINDS[kind],
    )  # fmt: skip
    model = peft.get_peft_model(net, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            parameter.data *= 1.3
    y = model(x)
    y.square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    parts = {"base": base, "grad": gradients, "merged": merged}
    tensors = {f"{part}.{n}": t.clone() for part, found in parts.items() for n, t in found.items()}
    save_file({**tensors, "x": x, "y": y.detach().clone()}, folder / "reference.safetensors")
    (folder / "README.md").unlink()


if __name__ == "__main__":
    here = Path(__file__).parent / "peft"
    shutil.rmtree(here, ignore_errors=True)
    for kind in KINDS:
        make(kind, here / kind)
