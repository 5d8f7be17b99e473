"""One training loop, used by everything that is trained in this book.

A step of the loop is a function of the seed and the step's number alone: which rows it sees and
what dropout draws. So a run that was killed and resumed from its checkpoint ends with the weights
of one that was not, on the same machine with as many threads, and on a GPU only if PyTorch is set
to deterministic algorithms. (Over 200 lines: half of them say what the arguments mean.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from compresskit.files import replacing
from compresskit.model import evaluating

Loss = Callable[[nn.Module, Any], Tensor]


class Run(NamedTuple):
    """What a training run did.

    Parameters
    ----------
    losses : list of float
        the loss of every step, before its update
    curve : list of dict
        at every evaluation: `step`, the number of steps done, and what `evaluate` returned
    """

    losses: list[float]
    curve: list[dict[str, float]]


class Shuffled(Sequence):
    """`steps` batches of `size` rows of some tensors, each epoch in a new order.

    Batch t is a function of (seed, t) alone. The last rows of an epoch that do not fill a batch
    are left out of that epoch; if there are fewer rows than `size`, a batch is all of them.

    Parameters
    ----------
    *tensors : Tensor
        of equal length
    size : int
        rows in a batch
    steps : int
        number of batches, which need not be whole epochs
    seed : int

    Raises
    ------
    ValueError
        no rows, tensors of different lengths, `size` or `steps` below 1

    Examples
    --------
    >>> rows = Shuffled(torch.arange(5), size=2, steps=3)
    >>> [len(rows[t][0]) for t in range(3)]
    [2, 2, 2]
    """

    def __init__(self, *tensors: Tensor, size: int, steps: int, seed: int = 0):
        lengths = [len(tensor) for tensor in tensors]
        if not lengths or min(lengths) < 1 or len(set(lengths)) > 1:
            raise ValueError(f"tensors of {lengths} rows; give tensors of equal length, 1 or more")
        if size < 1 or steps < 1:
            raise ValueError(f"size={size}, steps={steps}; both must be 1 or more, such as 100")
        self.tensors, self.steps, self.seed = tensors, steps, seed
        self.size = min(size, lengths[0])
        self._epoch, self._order = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, ...]:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} of {self.steps}")
        rows = len(self.tensors[0])
        epoch, place = divmod(step, rows // self.size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            self._epoch, self._order = epoch, torch.randperm(rows, generator=generator)
        chosen = self._order[place * self.size :][: self.size]
        return tuple(tensor[chosen.to(tensor.device)] for tensor in self.tensors)


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Sequence,
    *,
    rate: float = 1e-3,
    warmup: int = 0,
    decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float | None = 1.0,
    seed: int = 0,
    start: int = 0,
    after: Callable[[nn.Module, int, float], None] | None = None,
    parameters: Iterable | None = None,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int | None = None,
    checkpoint: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Run:
    """Train `model` in place, by AdamW if no other is named: one update for each batch, in order.

    The learning rate of step t of n is rate * min(1, (t + 1) / warmup) * (1 + cos(pi t / n)) / 2.

    Parameters
    ----------
    model : nn.Module
        in training mode during the run; afterwards in the mode it had
    loss : callable
        (model, batch) -> scalar, a mean over the batch
    batches : sequence
        batch t is `batches[t]`, asked for in order; what it holds is the loss's business
    rate : float
        largest learning rate
    warmup : int
        steps in which the rate rises
    decay : float
        AdamW's weight decay
    betas : (float, float)
        AdamW's two averaging constants
    clip : float
        gradients of a larger norm are scaled down to it; None: never
    seed : int
        of what the model draws in training, such as dropout
    start : int
        steps left out at the beginning, which count for the rate: for weights of step `start`
    after : callable
        (model, steps done, rate of the last one), called after every update without gradients,
        such as a proximal step
    parameters : iterable
        what is updated: parameters, or the groups that `torch.optim` takes; None means all that
        require a gradient
    optimizer : callable
        (parameters, lr=, betas=, weight_decay=) -> optimizer
    evaluate : callable
        model -> {name: value}; the weights kept at the end are those with the lowest first value
    every : int
        steps between evaluations and between checkpoints; None: evaluate at the end only
    checkpoint : Path
        written every `every` steps and at the end, whole or not at all; if the file exists, the
        run goes on from it
    recipe : mapping
        numbers and names that tell this run from others, kept in the checkpoint: one with another
        recipe is refused, as are other settings and shapes. Losses and data are not compared
    progress : bool
        show a bar, in a notebook or on a terminal

    Returns
    -------
    Run

    Raises
    ------
    FloatingPointError
        a loss or gradient that is not finite: the model keeps the weights from before that step
    ValueError
        no batch, or none from `start` on; `every` below 1; a checkpoint without `every`, or made by
        another run

    References
    ----------
    Loshchilov and Hutter, "Decoupled weight decay regularization", arXiv 1711.05101;
    "SGDR", arXiv 1608.03983, eq. 5 (the cosine).
    """
    steps = len(batches)
    if steps < 1 or (every is not None and every < 1):
        raise ValueError(f"{steps} batches, every={every}; one batch or more, and every >= 1")
    if not 0 <= start < steps:
        raise ValueError(f"start={start} of {steps} steps; from 0, the first, to {steps - 1}")
    if checkpoint is not None and every is None:
        raise ValueError(
            f"a checkpoint at the end only saves nothing from a kill; say every how many of {steps}"
            f" steps to write it, for instance every={max(1, steps // 10)}"
        )
    chosen = (
        [p for p in model.parameters() if p.requires_grad] if parameters is None else parameters
    )
    stepper = optimizer(chosen, lr=rate, betas=betas, weight_decay=decay)
    tops = [group["lr"] for group in stepper.param_groups]
    made = {
        "steps": steps,
        "seed": seed,
        "start": start,
        "rates": tops,
        "warmup": warmup,
        "betas": list(betas),
        "clip": clip,
        "decay": [group["weight_decay"] for group in stepper.param_groups],
        "recipe": _plain(recipe or {}),
        "shapes": [list(p.shape) for p in model.parameters()],
    }
    state: dict[str, Any] = {"made": made, "step": start, "losses": [], "curve": [], "best": None}
    if checkpoint is not None and Path(checkpoint).is_file():
        state = _resumed(Path(checkpoint), made)
        model.load_state_dict(state["model"])
        stepper.load_state_dict(state["optimizer"])
    bar = tqdm(total=steps, initial=state["step"], disable=not progress, unit="step")
    # `evaluating` puts every module back into its mode, however the run ends
    with evaluating(model), bar, torch.random.fork_rng(devices=_gpus(model)):
        model.train()
        for step in range(state["step"], steps):
            _reseed(seed + 7_919 * (step + 1), _gpus(model))
            for group, top in zip(stepper.param_groups, tops, strict=True):
                group["lr"] = _rate_at(step, steps, top, warmup)
            state["losses"].append(_update(model, stepper, loss, batches[step], clip, step))
            if after is not None:
                with torch.no_grad():
                    after(model, step + 1, _rate_at(step, steps, rate, warmup))
            bar.update()
            if (step + 1) % (every or steps) and step + 1 < steps:
                continue
            state["step"] = step + 1
            if evaluate is not None:
                _judge(model, evaluate, state)
                bar.set_postfix(state["curve"][-1])
            if checkpoint is not None:
                state |= {"model": model.state_dict(), "optimizer": stepper.state_dict()}
                _replace(Path(checkpoint), state)
    if state["best"] is not None:
        model.load_state_dict(state["best"])
    return Run(state["losses"], state["curve"])


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe as JSON has it; what JSON cannot hold could be written but not read again."""
    try:
        return json.loads(json.dumps(dict(recipe)))
    except TypeError as error:
        raise ValueError(f"recipe: {error}; it may hold numbers, text and lists of them") from error


def _gpus(model: nn.Module) -> list[int]:
    return sorted({p.device.index for p in model.parameters() if p.is_cuda})


def _reseed(seed: int, gpus: list[int]) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach for every GPU
    for gpu in gpus:
        with torch.cuda.device(gpu):
            torch.cuda.manual_seed(seed)


def _rate_at(step: int, steps: int, top: float, warmup: int) -> float:
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    return top * rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def _update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batch: Any,
    clip: float | None,
    step: int,
) -> float:
    value = loss(model, batch)
    _require_finite("loss", value, optimizer, step)
    model.zero_grad()
    value.backward()
    updated = [p for group in optimizer.param_groups for p in group["params"]]
    norm = nn.utils.clip_grad_norm_(updated, math.inf if clip is None else clip)
    _require_finite("gradient's norm", norm, optimizer, step)
    optimizer.step()
    return value.item()


def _require_finite(what: str, value: Tensor, optimizer: torch.optim.Optimizer, step: int) -> None:
    if not math.isfinite(value.detach()):
        raise FloatingPointError(
            f"the {what} is {value.item()} at step {step + 1}; the weights are those before it. Use"
            f" a rate below {optimizer.defaults['lr']:.2g}, a warmup, or inputs without infinities"
        )


def _judge(model: nn.Module, evaluate: Callable, state: dict[str, Any]) -> None:
    with evaluating(model), torch.no_grad():
        values = {name: float(value) for name, value in evaluate(model).items()}
    name, value = next(iter(values.items()))
    if math.isnan(value):
        raise FloatingPointError(f"`evaluate` gave {name} = nan after {state['step']} steps")
    if all(value < earlier[name] for earlier in state["curve"]):
        state["best"] = {name: t.detach().clone() for name, t in model.state_dict().items()}
    state["curve"].append({"step": state["step"], **values})


def _resumed(path: Path, made: dict[str, Any]) -> dict[str, Any]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        differing = [key for key in made if state["made"].get(key) != made[key]]
    except (UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint of `fit`; delete it to start anew") from error
    if differing:
        raise ValueError(
            f"{path} was made by another run: {', '.join(differing)} differ; delete it to start"
            " anew, or give the run a file of its own"
        )
    return state


def _replace(path: Path, state: dict[str, Any]) -> None:
    """A kill leaves the old or the new file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(state, file)
