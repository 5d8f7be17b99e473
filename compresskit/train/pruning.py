"""Training with zeros: fixed masks, masks that grow during a run, and masks found by many runs.

(Over 200 lines, more than half of them statements and refusals: which weights are gone, when, and
what the others go back to is all there is to these methods.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresskit.code import Code
from compresskit.files import replacing
from compresskit.layers import as_matrix, compressed
from compresskit.model import layers, named, replaced
from compresskit.sparse import Sparse, pooled_masks
from compresskit.train.loop import Loss, Run, fit
from compresskit.train.quantization_aware import Latent, registered

Masks = Mapping[str, Tensor]


class Masked(Latent):
    """weight -> weight where the mask is 1, and 0 elsewhere, with no gradient to what is removed.

    Parameters
    ----------
    mask : (m, n) bool tensor
        of the layer's matrix; True: kept
    """

    def __init__(self, mask: Tensor):
        super().__init__()
        self.register_buffer("mask", mask.detach().bool().clone())

    def code(self, weight: Tensor) -> Code:
        matrix = weight.detach().flatten(1)
        return Sparse.of(self.forward(matrix), self.mask, dtype=weight.dtype)

    def forward(self, weight: Tensor) -> Tensor:
        # chosen, not multiplied: no -0, and a removed weight passes on neither inf nor nan
        return torch.where(self.mask.reshape(weight.shape), weight, torch.zeros_like(weight))


def masked(model: nn.Module, masks: Masks) -> nn.Module:
    """A copy of `model` that computes with the kept weights and trains them alone.

    The gradient in a removed weight is exactly 0. What weight decay makes of the value behind it
    is never computed with, so no optimizer brings it back. `converted` gives the stored model.

    Parameters
    ----------
    model : nn.Module
    masks : mapping
        layer name -> (m, n) bool tensor of the layer's matrix, True for the weights kept

    Returns
    -------
    nn.Module, whose parameters "...parametrizations.weight.original" hold the removed weights too

    Raises
    ------
    ValueError : a name that is no layer, or whose weight is shared or computed from others; a mask
        of another shape or type

    Examples
    --------
    >>> from compresskit.train import converted
    >>> keep = torch.tensor([[True, False, True]])
    >>> model = masked(nn.Sequential(nn.Linear(3, 1)), {"0": keep})
    >>> model[0].weight.count_nonzero().item(), converted(model)[0].code.decode().shape
    (2, torch.Size([1, 3]))
    """
    found = named(model, layers(model), masks)
    for name, mask in masks.items():
        shape = tuple(as_matrix(found[name]).shape)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"a mask of {mask.dtype}, shape {tuple(mask.shape)}, for layer {name!r}; give"
                f" torch.bool of its matrix's shape {shape}, such as its weight.flatten(1) != 0"
            )
    return registered(model, {name: Masked(mask) for name, mask in masks.items()})


def unmasked(model: nn.Module) -> nn.Module:
    """A copy with plain layers again: the removed weights are 0, and free to be trained.

    Parameters
    ----------
    model : nn.Module
        from `masked`, or with masked layers among others
    """
    # PyTorch's own removal would take the weight of every copy of the layer away as well.
    model = copy.deepcopy(model)
    for name in masks_of(model):
        layer = model.get_submodule(name)
        kind = layer.parametrizations.weight
        plain = compressed(layer, kind[0].code(kind.original)).restored()
        model = replaced(model, name, plain.requires_grad_())
    return model


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """{layer name: (m, n) bool mask}, the present ones of the masked layers of `model`."""
    return {
        name: module.parametrizations.weight[0].mask
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module, "weight")
        and isinstance(module.parametrizations.weight[0], Masked)
    }


def support(model: nn.Module, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """{layer name: (m, n) bool mask} of the weights that are not 0.

    Parameters
    ----------
    model : nn.Module
    names : sequence of str
        of layers; None means all
    """
    found = named(model, layers(model), layers(model) if names is None else names)
    return {name: as_matrix(layer) != 0 for name, layer in found.items()}


@dataclass(frozen=True)
class Cubic:
    """s_t = final + (initial - final) (1 - (t - first) / (count every))^3, the sparsity at step t.

    Before `first` it is 0, after first + count * every it is `final`. The slope falls to 0 towards
    the end: many weights go while there are many to choose from, few when there are few.

    Parameters
    ----------
    final : float
        share of the weights that is removed in the end
    first : int
        updates before the first weights go, 1 or more
    count : int
        how many times more weights are removed
    every : int
        updates from one time to the next
    initial : float
        share removed at `first`

    Raises
    ------
    ValueError : not 0 <= initial <= final < 1; a number of updates below 1

    References
    ----------
    Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, eq. 1.

    Examples
    --------
    >>> [Cubic(0.8, first=10, count=2, every=5).sparsity(t) for t in (9, 10, 15, 20, 99)]
    [0.0, 0.0, 0.7000000000000001, 0.8, 0.8]
    """

    final: float
    first: int
    count: int
    every: int
    initial: float = 0.0

    def __post_init__(self):
        if not 0 <= self.initial <= self.final < 1:
            raise ValueError(
                f"initial={self.initial}, final={self.final}; 0 <= initial <= final < 1 is needed,"
                " such as 0 and 0.9"
            )
        if min(self.first, self.count, self.every) < 1:
            raise ValueError(
                f"first={self.first}, count={self.count}, every={self.every}; each must be 1 or"
                " more, such as 100, 10 and 50"
            )

    @property
    def last(self) -> int:
        """The update after which no more weights are removed."""
        return self.first + self.count * self.every

    def sparsity(self, step: int) -> float:
        """s_t after `step` updates, for any t, between two removals too.

        Parameters
        ----------
        step : int
        """
        if step < self.first:
            return 0.0
        left = max(0.0, 1 - (step - self.first) / (self.count * self.every))
        return self.final + (self.initial - self.final) * left**3

    def removes(self, step: int) -> bool:
        """Whether masks are chosen anew after `step` updates.

        Parameters
        ----------
        step : int
        """
        return self.first <= step <= self.last and (step - self.first) % self.every == 0


def gradual(
    model: nn.Module,
    loss: Loss,
    batches: Sequence,
    *,
    schedule: Cubic,
    names: Sequence[str] | None = None,
    pooled: bool = False,
    fit: Callable = fit,
) -> tuple[nn.Module, Run]:
    """Train a copy of `model`, removing its smallest weights little by little on the way.

    Each time the masks are chosen anew from all weights, the removed ones with the values they
    have behind the mask. These get no gradient; a removed weight returns if by then it is among
    the largest again.

    Parameters
    ----------
    model : nn.Module
        not changed
    loss : callable
        as for `fit`
    batches : sequence
        as for `fit`
    schedule : Cubic
        it must end before the batches do
    names : sequence of str
        of the layers; None means all
    pooled : bool
        compare the weights of all layers with one another; False: the same share of each layer,
        as in the paper
    fit : callable
        the loop, for instance with other rates: `functools.partial(fit, rate=1e-2)`; its `after`
        is taken

    Returns
    -------
    (nn.Module, Run), the module with fixed masks

    Raises
    ------
    ValueError : the schedule ends after the batches; the loop returned the weights of an earlier
        step, when fewer were removed; what `masked` refuses

    References
    ----------
    Zhu and Gupta, arXiv 1710.01878, section 3.
    """
    if schedule.last >= len(batches):
        raise ValueError(
            f"the last weights are removed after {schedule.last} updates and there are"
            f" {len(batches)}; give more batches, so that the network can recover"
        )
    found = layers(model) if names is None else {name: None for name in names}
    full = {n: torch.ones_like(m) for n, m in support(model, list(found)).items()}
    model = masked(model, full)
    groups = [list(found)] if pooled else [[name] for name in found]

    def after(model: nn.Module, done: int, rate: float) -> None:
        if schedule.removes(done):
            for group in groups:
                _remove(model, group, schedule.sparsity(done))

    run = fit(model, loss, batches, after=after)
    for group in groups:
        present = [masks_of(model)[name] for name in group]
        count = sum(mask.numel() for mask in present)
        gone = count - sum(int(mask.sum()) for mask in present)
        if gone != round(schedule.final * count):
            raise ValueError(
                f"{gone} of {count} weights are removed in the end, not {schedule.final:.0%}: the"
                " loop went back to weights that `evaluate` found better before the last were"
                " removed; give it no `evaluate`"
            )
    return model, run


class Round(NamedTuple):
    """One training of iterative pruning.

    Parameters
    ----------
    masks : dict
        layer name -> (m, n) bool tensor, those it was trained with
    weights : dict
        the model's state after it; removed weights are 0
    run : Run
    """

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]
    run: Run


class Tickets(NamedTuple):
    """What iterative pruning found.

    Parameters
    ----------
    origin : dict
        the state that every round but the first started from, before its mask, unless `rewind`
        was None
    rounds : list of Round
        the dense training first
    """

    origin: dict[str, Tensor]
    rounds: list[Round]


def iterative_magnitude(
    model: nn.Module,
    loss: Loss,
    batches: Sequence,
    *,
    rounds: int,
    rate: float = 0.2,
    rewind: int | None = 0,
    names: Sequence[str] | None = None,
    pooled: bool = True,
    halved: Sequence[str] = (),
    fit: Callable = fit,
    folder: Path | None = None,
) -> Tickets:
    """Train; remove the smallest weights; put the others back to what they were; again.

    Parameters
    ----------
    model : nn.Module
        not changed; its weights are the initialization
    loss : callable
        as for `fit`
    batches : sequence
        as for `fit`, the same in every round
    rounds : int
        how many times weights are removed; the loop trains rounds + 1 times
    rate : float
        share of the remaining weights that each round removes, rounded to a whole number
    rewind : int
        the kept weights, the biases, and the learning rate's schedule go back to this step of the
        first training; 0 is the initialization. None: the schedule goes back to its beginning, the
        weights stay as they were trained, so that each round trains them further
    names : sequence of str
        of the layers that are pruned; None means all
    pooled : bool
        compare the weights of all layers with one another; False: `rate` of each layer
    halved : sequence of str
        layers pruned apart, at half the rate, such as the output layer
    fit : callable
        the loop, for instance with other rates: `functools.partial(fit, rate=1e-2)`; its `start`
        and `after` are taken
    folder : Path
        every finished round is written there, whole or not at all, and not trained again; None:
        nothing is written. A folder belongs to one loss, one list of batches and one loop, which
        cannot be compared: use a new one when any of these changes

    Returns
    -------
    Tickets

    Raises
    ------
    ValueError : no round; a rate outside (0, 1); a step to rewind to that is no step; a layer left
        without weights; a folder of another run

    Notes
    -----
    It costs rounds + 1 trainings. Book: chapter "The lottery ticket".

    References
    ----------
    Frankle and Carbin, "The lottery ticket hypothesis", arXiv 1803.03635, section 1 and
    appendix B; Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", arXiv
    1912.05671 (rewinding to a step); Renda, Frankle, Carbin, "Comparing rewinding and fine-tuning",
    arXiv 2003.02389 (rewinding the learning rate alone).
    """
    if rounds < 1 or not 0 < rate < 1:
        raise ValueError(f"rounds={rounds}, rate={rate}; 1 or more, and 0 < rate < 1, such as 0.2")
    if rewind is not None and not 0 <= rewind < len(batches):
        raise ValueError(
            f"rewind={rewind} of {len(batches)} steps; from 0, the initialization, to"
            f" {len(batches) - 1}, or None"
        )
    chosen = list(layers(model)) if names is None else list(names)
    masks = {n: torch.ones_like(m) for n, m in support(model, chosen).items()}
    unknown = [name for name in halved if name not in masks]
    if unknown:
        raise ValueError(f"halved={unknown} are not among the pruned layers {chosen}")
    options = {"rate": rate, "pooled": pooled, "halved": halved}
    made = {"rewind": rewind, "steps": len(batches), "names": chosen, **options}
    store = _Store(folder, made | {"halved": list(halved)}, _state(model))
    origin, done = _state(model), []
    for number in range(rounds + 1):
        if number:
            masks = fewer(_matrices(done[-1].weights, masks), masks, **options)
        saved = store.load(number)
        if saved is None:
            started = copy.deepcopy(model)
            started.load_state_dict(done[-1].weights if done and rewind is None else origin)
            trained = masked(started, masks)
            snapshot: dict[str, Tensor] = {}

            def after(model: nn.Module, step: int, rate: float, snapshot=snapshot) -> None:
                if step == rewind:
                    snapshot |= _state(unmasked(model))

            run = fit(trained, loss, batches, start=(number and rewind) or 0, after=after)
            if not number and rewind:
                origin = snapshot
            saved = origin, Round(masks, _state(unmasked(trained)), run)
            store.save(number, saved)
        origin, result = saved
        done.append(result)
    return Tickets(origin, done)


def fewer(
    weights: Mapping[str, Tensor],
    masks: Masks,
    *,
    rate: float,
    pooled: bool = True,
    halved: Sequence[str] = (),
) -> dict[str, Tensor]:
    """The masks without the smallest round(rate * kept) of their weights; of equal ones the first.

    Parameters
    ----------
    weights : mapping
        layer name -> (m, n) tensor, trained
    masks : mapping
        layer name -> (m, n) bool tensor
    rate : float
        share of the kept weights to remove
    pooled : bool
        as for `iterative_magnitude`
    halved : sequence of str
        as for `iterative_magnitude`

    Raises
    ------
    ValueError : no weight would be left of those that are compared

    Examples
    --------
    >>> mask = torch.tensor([[True, True, False, True]])
    >>> weight = torch.tensor([[3.0, -1.0, 0.5, 2.0]])
    >>> fewer({"0": weight}, {"0": mask}, rate=1 / 3)["0"].int().tolist()
    [[1, 0, 0, 1]]
    """
    others = [name for name in masks if name not in halved]
    groups = ([others] if others else []) if pooled else [[name] for name in others]
    shares = [(group, rate) for group in groups] + [([name], rate / 2) for name in halved]
    result = {}
    for group, share in shares:
        count = sum(masks[name].numel() for name in group)
        kept = sum(int(masks[name].sum()) for name in group)
        left = kept - round(share * kept)
        if left < 1:
            raise ValueError(
                f"{share:g} of the last {kept} weights of {group} leaves none; use fewer rounds"
            )
        scores = {n: torch.where(masks[n], weights[n].abs(), -1.0) for n in group}  # gone: first
        result |= pooled_masks(scores, (count - left) / count)
    return {name: result[name] for name in masks}


def _remove(model: nn.Module, names: Sequence[str], sparsity: float) -> None:
    """Set the masks of some layers to all but the smallest of their latent weights."""
    kinds = {name: model.get_submodule(name).parametrizations.weight for name in names}
    scores = {name: kind.original.detach().flatten(1).abs() for name, kind in kinds.items()}
    for name, mask in pooled_masks(scores, sparsity).items():
        kinds[name][0].mask.copy_(mask)


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _matrices(state: Mapping[str, Tensor], names: Masks) -> dict[str, Tensor]:
    return {name: state[f"{name}.weight".lstrip(".")].flatten(1) for name in names}


class _Store:
    """The finished rounds of one run in a folder, or nowhere."""

    def __init__(self, folder: Path | None, made: dict[str, Any], initial: dict[str, Tensor]):
        self.folder, self.made, self.initial = folder, made, initial

    def load(self, number: int) -> tuple[dict[str, Tensor], Round] | None:
        if self.folder is None or not self._path(number).is_file():
            return None
        state = torch.load(self._path(number), weights_only=True)
        first = state["initial"]
        same = state["made"] == self.made and first.keys() == self.initial.keys()
        if not same or not all(torch.equal(first[name], t) for name, t in self.initial.items()):
            raise ValueError(
                f"{self._path(number)} was made by another run, with other settings or other first"
                " weights; delete it to start anew, or give the run a folder of its own"
            )
        return state["origin"], Round(state["masks"], state["weights"], Run(*state["run"]))

    def save(self, number: int, saved: tuple[dict[str, Tensor], Round]) -> None:
        if self.folder is None:
            return
        origin, round_ = saved
        path = self._path(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"made": self.made, "initial": self.initial, "origin": origin}
        state |= round_._asdict() | {"run": list(round_.run)}
        with replacing(path) as file:
            torch.save(state, file)

    def _path(self, number: int) -> Path:
        return Path(self.folder) / f"round_{number:02d}.pt"
