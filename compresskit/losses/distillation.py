"""What a student is trained to match: probabilities, logits or features of its teacher.

Logits are (..., classes) tensors: (batch, classes), (batch, length, vocabulary), or one vector.
Every loss is a mean over *positions*, the leading dimensions taken together, never a sum over the
sequence; it is in nats where it is a divergence. Teachers are detached: no gradient reaches them.

Losses are computed and returned in float64, whatever comes in, from log-probabilities. So any
finite float16, bfloat16 or float32 logits give a finite loss, and a gradient that is finite up to
its last step, the rounding to the type of the logits. A narrower type would not do: T^2 KL is T^2
times a difference of order 1/T^2 between terms of order 1, of which float32 keeps one digit at
T = 1000. The price is 8 bytes per logit and intermediate, arithmetic that is slow on GPUs made for
graphics, and none on those without float64; for large vocabularies there is `TopK`.

(Over 200 lines, most of them statements, shapes and refusals: losses are compared side by side.)
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

TEMPERATURES = (1e-6, 1e6)  # beyond: ln(p/q) is lost in the rounding of float64
LARGEST = 1e100  # float32 ends at 3.4e38; the square of this is still a float64


class TopK(NamedTuple):
    """A teacher's k most probable classes, and the rest as one: what `topk_targets` returns.

    Fields: indices (..., k), log_probs (..., k), log_rest (...), the log of the mass of all other
    classes, -inf if there is none; and the temperature at which those were taken. Stored as int32
    and float16 a position takes 6 k + 2 bytes.
    """

    indices: Tensor
    log_probs: Tensor
    log_rest: Tensor
    temperature: float = 1.0


def softmax_temperature(logits: Tensor, temperature: float, *, dim: int = -1) -> Tensor:
    """p_i = exp(z_i / T) / sum_j exp(z_j / T): uniform as T grows, only the largest as T → 0.

    Parameters
    ----------
    logits : (..., classes) tensor of a floating type, z
    temperature : float, T, from 1e-6 to 1e6
    dim : int, the dimension of the classes

    Returns
    -------
    tensor of the shape and type of the logits (float32 for narrower ones), differentiable in them

    Raises
    ------
    ValueError : logits that are not finite floating numbers, a temperature outside its range

    References
    ----------
    Hinton, Vinyals and Dean, arXiv:1503.02531, equation 1. Book: chapter 3.

    Examples
    --------
    >>> softmax_temperature(torch.tensor([0.0, math.log(9)]), 2.0)
    tensor([0.2500, 0.7500])
    """
    z = _logits(logits, "logits").movedim(dim, -1)
    kept = torch.promote_types(logits.dtype, torch.float32)
    return _log_softmax(z, temperature).exp().movedim(-1, dim).to(kept)


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    alpha: float,
    alpha_weighs: str = "soft",
    ignore_index: int = -100,
) -> Tensor:
    """(1 - α) CE(y, p_S) + α T² KL(p_T^(T) || p_S^(T)), the mean over positions with a label.

    The hard term is at T = 1. The gradient of KL alone in a student logit, at one position, is
    (p_S - p_T) / T at temperature T, of order 1/T²; the factor T² keeps the weight of the soft
    term when T changes. It does not make its gradient that of T = 1.

    Parameters
    ----------
    student_logits, teacher_logits : (..., classes) tensors of one shape
    labels : (...) integer tensor
        classes, or `ignore_index` where neither term counts (padding)
    temperature : float, T, from 1e-6 to 1e6
    alpha : float, α, from 0 to 1
    alpha_weighs : str
        "soft": as above. "hard": the other convention, in which α weighs the cross-entropy and
        1 - α the soft term; papers and programs use both
    ignore_index : int

    Returns
    -------
    scalar float64 tensor, in nats

    Raises
    ------
    ValueError : unequal shapes, labels that are no classes or all ignored, T or α out of range,
        logits that are not finite floating numbers, an unknown convention

    References
    ----------
    Hinton, Vinyals and Dean, arXiv:1503.02531, section 2. Book: chapter 3.
    """
    _check_alpha(alpha, alpha_weighs)
    _check_shapes(student_logits, teacher_logits)
    keep = _labeled(labels, student_logits, ignore_index)
    student, teacher = _pair(student_logits[keep], teacher_logits[keep])
    labels = labels[keep].long()
    hard = _cross_entropy(student, labels)
    soft = temperature**2 * _kl(_log_softmax(teacher, temperature), student, temperature)
    share = alpha if alpha_weighs == "soft" else 1 - alpha
    return ((1 - share) * hard + share * soft).mean()


def forward_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """KL(p_T || p_S) = sum p_T ln(p_T / p_S) at temperature T: large where the student has no mass.

    Its gradient in the student is that of the cross-entropy against soft labels. There is no
    factor T² here.

    Parameters
    ----------
    student_logits, teacher_logits : (..., classes) tensors of one shape
    temperature : float, T, from 1e-6 to 1e6
    keep : (...) bool tensor
        the positions that count; None for all

    Returns
    -------
    scalar float64 tensor, mean nats per position

    Raises
    ------
    ValueError : unequal shapes, logits that are not finite floating numbers, T out of range, a
        mask that is not boolean or keeps nothing

    References
    ----------
    Book: chapter 3.
    """
    student, teacher = _kept(student_logits, teacher_logits, keep)
    return _kl(_log_softmax(teacher, temperature), student, temperature).mean()


def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """KL(p_S || p_T): large where the student puts mass and the teacher none. Mode seeking.

    Arguments, result and errors as for `forward_kl`.

    References
    ----------
    As a distillation loss: Gu et al., "MiniLLM", arXiv:2306.08543. Book: chapter 3.
    """
    student, teacher = _kept(student_logits, teacher_logits, keep)
    own = _log_softmax(student, temperature)
    return (own.exp() * (own - _log_softmax(teacher, temperature))).sum(-1).mean()


def jensen_shannon(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """(KL(p_T || m) + KL(p_S || m)) / 2 with m = (p_T + p_S) / 2: symmetric, and at most ln 2.

    Arguments, result and errors as for `forward_kl`.

    References
    ----------
    Lin, "Divergence measures based on the Shannon entropy", 1991. Book: chapter 3.
    """
    student, teacher = _kept(student_logits, teacher_logits, keep)
    p, q = (_log_softmax(z, temperature) for z in (teacher, student))
    middle = torch.logaddexp(p, q) - math.log(2)
    return ((p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1) / 2).mean()


def logit_matching(
    student_logits: Tensor, teacher_logits: Tensor, *, keep: Tensor | None = None
) -> Tensor:
    """||(z_S - mean z_S) - (z_T - mean z_T)||² / (2 K), K classes: the limit of T² KL as T → ∞.

    Arguments, result and errors as for `forward_kl`, without a temperature.

    References
    ----------
    Ba and Caruana, arXiv:1312.6184; Hinton, Vinyals and Dean, arXiv:1503.02531, section 2.1.
    Book: chapter 3.
    """
    student, teacher = _kept(student_logits, teacher_logits, keep)
    difference = student - teacher
    difference = difference - difference.mean(-1, keepdim=True)
    return (difference.square().sum(-1) / (2 * difference.shape[-1])).mean()


def topk_targets(teacher_logits: Tensor, k: int, *, temperature: float = 1.0) -> TopK:
    """The k largest of p_T at temperature T, and the mass 1 - sum of them, as logarithms.

    Parameters
    ----------
    teacher_logits : (..., classes) tensor
    k : int, from 1 to classes
    temperature : float, T, from 1e-6 to 1e6; `topk_kl` needs the same one

    Returns
    -------
    TopK, in float64

    Raises
    ------
    ValueError : k or T out of range, logits that are not finite floating numbers

    References
    ----------
    Book: chapter 5.
    """
    teacher = _logits(teacher_logits, "teacher_logits").detach()
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= teacher.shape[-1]:
        raise ValueError(f"k={k}; it must be a number from 1 to {teacher.shape[-1]} classes")
    log_probs, indices = _log_softmax(teacher, temperature).topk(k, dim=-1)
    rest = _log_rest(_log_softmax(teacher, temperature), indices)
    return TopK(indices, log_probs, rest, float(temperature))


def topk_kl(
    student_logits: Tensor,
    targets: TopK,
    *,
    temperature: float,
    keep: Tensor | None = None,
    renormalize: bool = False,
) -> Tensor:
    """KL(p_T || p_S) once all classes outside the teacher's k are lumped into one.

    Lumping is data processing, so this is never above `forward_kl`; with k at least classes - 1
    it is equal. No factor T².

    Parameters
    ----------
    student_logits : (..., classes) tensor
    targets : TopK
        of the same positions and the same temperature
    temperature : float, T, from 1e-6 to 1e6
    keep : (...) bool tensor
        the positions that count; None for all
    renormalize : bool
        instead, the common variant: both distributions renormalized over the k classes, the rest
        forgotten. It is biased: zero for any student with the right ratios among the k, however
        little mass it gives them

    Returns
    -------
    scalar float64 tensor, mean nats per position

    Raises
    ------
    ValueError : targets of other shape, as for `forward_kl`

    References
    ----------
    Data processing: book, chapter 2. Use: book, chapter 5.
    """
    indices, log_probs, log_rest, made_at = targets
    if made_at != temperature:
        raise ValueError(
            f"targets made at temperature {made_at} for a loss at {temperature}: the mass of the"
            f" rest does not follow; use topk_targets(..., temperature={temperature})"
        )
    if indices.shape[:-1] != student_logits.shape[:-1] or log_probs.shape != indices.shape:
        raise ValueError(
            f"targets of shape {tuple(indices.shape)} for student_logits of shape"
            f" {tuple(student_logits.shape)}; they must be {(*student_logits.shape[:-1], 'k')}"
        )
    keep = _mask(keep, student_logits)
    student = _logits(student_logits[keep], "student_logits")
    indices, p = indices[keep].long(), log_probs[keep].detach().double()
    if indices.numel() and not (0 <= indices.min() and indices.max() < student.shape[-1]):
        raise ValueError(
            f"targets name class {int(indices.max())}; the student knows 0 to"
            f" {student.shape[-1] - 1}: build them with topk_targets from logits of as many classes"
        )
    every = _log_softmax(student, temperature)
    q = every.gather(-1, indices)
    if renormalize:
        p, q = (x - x.logsumexp(-1, keepdim=True) for x in (p, q))
    elif indices.shape[-1] < student.shape[-1]:
        p = torch.cat([p, log_rest[keep].detach().double()[..., None]], -1)
        q = torch.cat([q, _log_rest(every, indices)[..., None]], -1)
    mass = p.exp()
    return torch.where(mass > 0, mass * (p - q), 0.0).sum(-1).mean()


def feature_loss(
    student_features: Tensor,
    teacher_features: Tensor,
    projection: Callable[[Tensor], Tensor] | Tensor | None = None,
    *,
    kind: str = "mse",
) -> Tensor:
    """mean (W h_S - h_T)², or mean 1 - cos(W h_S, h_T): the student's features explain the teacher.

    W acts on the *student's* features. On the teacher's, h_S = 0 and W = 0 would be perfect; here
    a loss of zero means that the teacher's features can be computed from the student's.

    Parameters
    ----------
    student_features : (..., d) tensor, h_S
    teacher_features : (..., D) tensor, h_T
    projection : module (or other function) from (..., d) to (..., D), or a (D, d) matrix W
        trained with the student and thrown away; None if d = D
    kind : str
        "mse": mean over positions and features, in squared units of h_T; "cosine": over positions

    Returns
    -------
    scalar float64 tensor

    Raises
    ------
    ValueError : shapes that do not fit after the projection, no features, an unknown kind

    References
    ----------
    Romero et al., "FitNets", arXiv:1412.6550, equation 3. Cosine: Sanh et al., arXiv:1910.01108.
    Book: chapter 5.
    """
    if kind not in ("mse", "cosine"):
        raise ValueError(f'kind={kind!r}; it must be "mse" or "cosine"')
    teacher = teacher_features.detach().double()
    student = student_features
    if isinstance(projection, Tensor):
        if projection.ndim != 2 or projection.shape[1] != student.shape[-1]:
            raise ValueError(
                f"a projection of shape {tuple(projection.shape)} for student features of shape"
                f" {tuple(student.shape)}; use {(teacher.shape[-1], student.shape[-1])}"
            )
        student = student.double() @ projection.double().T
    elif projection is not None:
        student = projection(student)
    student = student.double()
    if student.shape != teacher.shape or not teacher.numel():
        raise ValueError(
            f"student features {tuple(student.shape)} and teacher features {tuple(teacher.shape)};"
            " they must agree and not be empty: use a projection, for instance"
            f" torch.nn.Linear({student_features.shape[-1]}, {teacher.shape[-1]})"
        )
    if kind == "cosine":
        return (1 - torch.cosine_similarity(student, teacher, dim=-1)).mean()
    return (student - teacher).square().mean()


def mutual_losses(
    logits: Sequence[Tensor], labels: Tensor, *, temperature: float = 1.0, weight: float = 1.0
) -> Tensor:
    """CE_i + weight T² mean over j ≠ i of KL(p_j || p_i), for k students that teach one another.

    The p_j are detached, so entry i has a gradient in the logits of student i only, and the sum
    of all entries may be differentiated at once. Zhang et al. have T = 1 and weight 1.

    Parameters
    ----------
    logits : sequence of k >= 2 tensors (..., classes) of one shape
    labels : (...) integer tensor, classes
    temperature : float, T, from 1e-6 to 1e6
    weight : float, at least 0

    Returns
    -------
    (k,) float64 tensor, in nats

    Raises
    ------
    ValueError : fewer than two students, a negative weight, as for `distillation_loss`

    References
    ----------
    Zhang et al., "Deep mutual learning", arXiv:1706.00384, equation 8. Book: chapter 5.
    """
    if len(logits) < 2:
        raise ValueError(f"{len(logits)} student; it takes at least 2 to teach one another")
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight={weight}; it must be 0 or more and finite, for instance 1.0")
    students = [_pair(z, logits[0])[0] for z in logits]
    keep = _labeled(labels, students[0], None)
    students = [z[keep] for z in students]
    peers = [_log_softmax(z.detach(), temperature) for z in students]
    losses = []
    for i, student in enumerate(students):
        lessons = [_kl(p, student, temperature) for j, p in enumerate(peers) if j != i]
        peer = temperature**2 * torch.stack(lessons).mean(0)
        losses.append((_cross_entropy(student, labels[keep].long()) + weight * peer).mean())
    return torch.stack(losses)


def ensemble_logits(logits: Sequence[Tensor]) -> Tensor:
    """ln of the mean of the teachers' probabilities: logits whose softmax is the mixture.

    The mean of the logits instead would give the (renormalized) geometric mean.

    Parameters
    ----------
    logits : sequence of tensors (..., classes) of one shape, or a tensor (teachers, ..., classes)

    Returns
    -------
    (..., classes) float64 tensor

    Raises
    ------
    ValueError : no teacher, unequal shapes, logits that are not finite floating numbers

    References
    ----------
    Hinton, Vinyals and Dean, arXiv:1503.02531, section 2. Book: chapter 4.
    """
    if not len(logits):
        raise ValueError("no logits; an ensemble has at least one teacher")
    checked = [_pair(z, logits[0])[0] for z in logits]
    return torch.stack([z.log_softmax(-1) for z in checked]).logsumexp(0) - math.log(len(checked))


def _logits(logits, name):
    """The logits in float64; the gradient is rounded to their own type on its way back.

    Positions that do not count have been left out before: what stands in padding is no matter.
    """
    if not logits.is_floating_point():
        raise ValueError(
            f"{name} of type {logits.dtype}; logits are floating numbers: use {name}.float()"
        )
    if logits.ndim < 1 or logits.shape[-1] < 2:
        raise ValueError(
            f"{name} of shape {tuple(logits.shape)}; they must be (..., classes) with two classes"
            " or more, for instance (32, 10)"
        )
    wide = logits.double()
    if not (wide.detach().abs() <= LARGEST).all():
        raise ValueError(
            f"{name} contain NaN, infinity or more than {LARGEST:.0e}; they must be finite: give a"
            " class that is ruled out a logit such as -1e4"
        )
    return wide


def _check_shapes(student_logits, teacher_logits):
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"logits of shapes {tuple(student_logits.shape)} and {tuple(teacher_logits.shape)};"
            " they must agree: the same positions and the same classes"
        )


def _pair(student_logits, teacher_logits):
    _check_shapes(student_logits, teacher_logits)
    student = _logits(student_logits, "student_logits")
    return student, _logits(teacher_logits, "teacher_logits").detach()


def _kept(student_logits, teacher_logits, keep):
    _check_shapes(student_logits, teacher_logits)
    keep = _mask(keep, student_logits)
    return _pair(student_logits[keep], teacher_logits[keep])


def _mask(keep, logits):
    """`keep`, or all positions: a boolean mask of at least one position."""
    shape = logits.shape[:-1]
    if keep is None:
        keep = torch.ones(shape, dtype=torch.bool, device=logits.device)
    if keep.dtype != torch.bool or keep.shape != shape:
        raise ValueError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}; it must be a torch.bool mask of"
            f" shape {tuple(shape)}, for instance labels != -100"
        )
    if not keep.any():
        raise ValueError("no position is left to average over; keep at least one")
    return keep


def _labeled(labels, logits, ignore_index):
    """Mask of the positions that have a label, all of which are classes."""
    classes = logits.shape[-1]
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels of type {labels.dtype}; they must be integers: labels.long()")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for logits of shape {tuple(logits.shape)};"
            f" they must be {tuple(logits.shape[:-1])}, one class per position"
        )
    keep = torch.ones_like(labels, dtype=torch.bool)
    if ignore_index is not None:
        keep = labels != ignore_index
    keep = _mask(keep, logits)
    low, high = int(labels[keep].min()), int(labels[keep].max())
    if low < 0 or high >= classes:
        raise ValueError(
            f"labels from {low} to {high}; with {classes} classes they go from 0 to {classes - 1}"
            + ("" if ignore_index is None else f", and {ignore_index} is ignored")
        )
    return keep


def _check_alpha(alpha, alpha_weighs):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha}; it must be from 0 to 1, for instance 0.9")
    if alpha_weighs not in ("soft", "hard"):
        raise ValueError(
            f'alpha_weighs={alpha_weighs!r}; it must be "soft" (alpha on the teacher\'s term) or'
            ' "hard" (alpha on the cross-entropy)'
        )


def _log_softmax(logits, temperature):
    low, high = TEMPERATURES
    if not low <= temperature <= high:
        raise ValueError(
            f"temperature={temperature}; it must be from {low:g} to {high:g}, for instance 4.0"
            " (the limit of high temperatures is logit_matching)"
        )
    return (logits / temperature).log_softmax(-1)


def _cross_entropy(student, labels):
    return -student.log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)


def _kl(log_teacher, student, temperature):
    """Nats at each position. Log-probabilities are finite, so 0 ln 0 is 0 without further care."""
    difference = log_teacher - _log_softmax(student, temperature)
    return (log_teacher.exp() * difference).sum(-1)


def _log_rest(log_probs, indices):
    """ln of the mass outside `indices`, from the other log-probabilities: 1 - sum would cancel."""
    return log_probs.scatter(-1, indices, -torch.inf).logsumexp(-1)
