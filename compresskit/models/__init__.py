"""The models of the book: small ones trained here, real ones read from installed packages."""

import torch
from torch import nn

from compresskit.models import classifiers, store
from compresskit.models.decoder import Decoder, DecoderConfig
from compresskit.models.encoder import EncoderConfig, SentenceEncoder, minilm
from compresskit.models.smol import smollm2

__all__ = [
    "Decoder",
    "DecoderConfig",
    "EncoderConfig",
    "SentenceEncoder",
    "digits_cnn",
    "digits_mlp",
    "minilm",
    "mnist1d_cnn",
    "mnist1d_mlp",
    "pydoc_lm",
    "smollm2",
]


def pydoc_lm(*, device: torch.device | str = "cpu") -> Decoder:
    """The book's language model: (N, T) byte values -> (N, T, 256) logits of the next byte.

    Six blocks of width 128, 1.3 million parameters, trained on the training split of
    `data.pydoc()` in windows of 256 bytes, so measure it in such windows. Recipe, curve and
    checksum are in assets/pydoc_lm.json. It has seen nothing else, and knows no other text.

    Raises
    ------
    ValueError : the weights file is missing, or not the one whose checksum was recorded
    """
    return store.restore(
        lambda record: Decoder(DecoderConfig(**record["recipe"]["model"])),
        "pydoc_lm",
        device=device,
    )


def mnist1d_mlp(*, device: torch.device | str = "cpu") -> nn.Sequential:
    """(N, 40) -> (N, 10) logits: a multilayer perceptron trained on `data.mnist1d()`."""
    return store.restore(lambda _: classifiers.mnist1d_mlp(), "mnist1d_mlp", device=device)


def mnist1d_cnn(*, device: torch.device | str = "cpu") -> nn.Sequential:
    """(N, 40) -> (N, 10) logits: a convolutional net trained on `data.mnist1d()`."""
    return store.restore(lambda _: classifiers.mnist1d_cnn(), "mnist1d_cnn", device=device)


def digits_mlp(*, device: torch.device | str = "cpu") -> nn.Sequential:
    """(N, 64) -> (N, 10) logits: a multilayer perceptron trained on `data.digits()`."""
    return store.restore(lambda _: classifiers.digits_mlp(), "digits_mlp", device=device)


def digits_cnn(*, device: torch.device | str = "cpu") -> nn.Sequential:
    """(N, 64) -> (N, 10) logits: a convolutional net trained on `data.digits()`."""
    return store.restore(lambda _: classifiers.digits_cnn(), "digits_cnn", device=device)
