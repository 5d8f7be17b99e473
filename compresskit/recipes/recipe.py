"""What the training of the byte model draws at step t: a function of (seed, t) alone.

No generator runs through the whole training, so a run that was killed and resumed from its
checkpoint sees the same windows as one that was not.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from compresskit import data
from compresskit.models.decoder import Decoder, DecoderConfig


@dataclass(frozen=True)
class Recipe:
    """All that decides the trained weights, besides the text and the machine's arithmetic.

    Parameters
    ----------
    model : shape of the network, with the dropout used in training
    seed : of the initial weights, the windows and the dropout
    steps, batch : number of updates, and of windows (of `model.context` tokens) in each
    rate, warmup : learning rate, `rate` times a half cosine from 1 to 0 over all steps, times a
        line from 0 to 1 over the first `warmup` of them
    decay : AdamW's weight decay of the matrices (norms and the embedding have none)
    shuffle : paragraphs travel about this many places from where the manual has them
    every : steps between two evaluations; the weights best on the calibration text are kept
    """

    model: DecoderConfig
    seed: int = 0
    steps: int = 4_000
    batch: int = 8
    rate: float = 3e-3
    warmup: int = 200
    decay: float = 0.1
    shuffle: float = 16.0
    every: int = 500


def initialized(recipe: Recipe) -> Decoder:
    """A decoder with weights of variance 1/n, and 1/(2 layers n) where blocks add to the stream."""
    generator = torch.Generator().manual_seed(recipe.seed)
    with torch.device("meta"):  # PyTorch's own initial weights would draw from the global state
        model = Decoder(recipe.model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            spread = parameter.shape[1] ** -0.5
            if name == "embed.weight":
                spread = 0.02
            elif name.endswith((".o.weight", ".down.weight")):
                spread /= math.sqrt(2 * recipe.model.layers)
            parameter.normal_(std=spread, generator=generator)
    return model


class Windows:
    """The training windows of every step, each epoch a new order and a new offset of the text."""

    def __init__(self, paragraphs: tuple[str, ...], recipe: Recipe):
        self.paragraphs, self.recipe = paragraphs, recipe
        self.length = recipe.model.context + 1
        bytes_used = len(data.text(paragraphs)) - recipe.model.context
        self.per_epoch = bytes_used // self.length // recipe.batch
        if self.per_epoch < 1:
            raise ValueError(
                f"the text holds {bytes_used} bytes, fewer than one batch of "
                f"{recipe.batch} windows of {self.length}; use a smaller batch or context"
            )
        self.epoch, self.cut = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, step: int) -> Tensor:
        """(batch, context + 1) token ids of one step."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.cut = epoch, self._cut(epoch)
        return self.cut[place * self.recipe.batch :][: self.recipe.batch]

    def _cut(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.recipe.seed + 1_000_003 * epoch)
        count = len(self.paragraphs)
        travel = self.recipe.shuffle * torch.rand(count, generator=generator)
        order = torch.argsort(torch.arange(count) + travel).tolist()
        ids = data.text([self.paragraphs[i] for i in order])
        offset = int(torch.randint(self.recipe.model.context, (1,), generator=generator))
        ids = ids[offset:][: (len(ids) - offset) // self.length * self.length]
        windows = ids.view(-1, self.length)
        return windows[torch.randperm(len(windows), generator=generator)]
