"""Four small classifiers with known jobs: two multilayer perceptrons, two convolutional nets."""

from collections import OrderedDict

from torch import nn


def mnist1d_mlp() -> nn.Sequential:
    """(N, 40) -> (N, 10) logits by two hidden layers of 128: 23,050 parameters."""
    return _mlp(40, 128, 128)


def digits_mlp() -> nn.Sequential:
    """(N, 64) -> (N, 10) logits by two hidden layers of 128 and 64: 17,226 parameters."""
    return _mlp(64, 128, 64)


def mnist1d_cnn() -> nn.Sequential:
    """(N, 40) -> (N, 10) logits by three convolutions along the line, each halving its length."""
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 1, 40)),
            conv1=nn.Conv2d(1, 32, (1, 5), stride=(1, 2), padding=(0, 2)),  # (N, 32, 1, 20)
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 64, (1, 3), stride=(1, 2), padding=(0, 1)),  # (N, 64, 1, 10)
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(64, 64, (1, 3), stride=(1, 2), padding=(0, 1)),  # (N, 64, 1, 5)
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(320, 10),
        )
    )


def digits_cnn() -> nn.Sequential:
    """(N, 64) -> (N, 10) logits by three 3x3 convolutions; the last two halve the 8x8 image."""
    return nn.Sequential(
        OrderedDict(
            image=nn.Unflatten(1, (1, 8, 8)),
            conv1=nn.Conv2d(1, 16, 3, padding=1),  # (N, 16, 8, 8)
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1),  # (N, 32, 4, 4)
            relu2=nn.ReLU(),
            conv3=nn.Conv2d(32, 64, 3, stride=2, padding=1),  # (N, 64, 2, 2)
            relu3=nn.ReLU(),
            flatten=nn.Flatten(),
            head=nn.Linear(256, 10),
        )
    )


def _mlp(inputs: int, first: int, second: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            linear1=nn.Linear(inputs, first),
            relu1=nn.ReLU(),
            linear2=nn.Linear(first, second),
            relu2=nn.ReLU(),
            head=nn.Linear(second, 10),
        )
    )
