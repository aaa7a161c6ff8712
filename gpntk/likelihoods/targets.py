"""Classification by regression: class labels as targets of a GP with Gaussian noise.

A GP per class, all with the same kernel, is fitted to +1 for its class and to 0 for the others, less the mean of both
over the classes. The class with the largest posterior mean is predicted. It costs one factorisation for all classes and
needs no approximation, but the noise is not that of labels: means are no probabilities.
Dirichlet targets give the noise of labels instead, one variance per target, and with it one factorisation per class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gpntk._checks import check_count, check_dtype, check_positive, check_tensors
from gpntk.errors import InputError


def one_hot_targets(labels: Tensor, num_classes: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Regression targets `[N, C]` for class labels `[N]`: 1 - 1/C for the class, -1/C for the others.

    Rows sum to zero, as a GP of mean zero wants them; with ten classes they are 0.9 and -0.1. `gpntk.GradientFlow`
    takes them as they are, `gpntk.models.TangentGP` with a kernel of C outputs likewise. An ``ExactGP`` that is a batch
    of C independent GPs takes their transpose `[C, N]`, as with GPyTorch's ``DirichletClassificationLikelihood``.

    Args:
        labels: Classes, integers from 0 to C - 1.
        num_classes: C; by default one more than the largest label.
        dtype: Of the targets; by default torch's.

    Raises:
        InputError: ``labels`` is empty, no vector or not of integers, or has a class that is negative or not below C;
            or C is less than 2.

    Example:
        >>> import torch
        >>> from gpntk.likelihoods import one_hot_targets
        >>> one_hot_targets(torch.tensor([0, 2, 1, 0]), num_classes=4)
        tensor([[ 0.7500, -0.2500, -0.2500, -0.2500],
                [-0.2500, -0.2500,  0.7500, -0.2500],
                [-0.2500,  0.7500, -0.2500, -0.2500],
                [ 0.7500, -0.2500, -0.2500, -0.2500]])

    References:
        Lee et al. (2018), Deep Neural Networks as Gaussian Processes, https://arxiv.org/abs/1711.00165, section 3.
    """
    check_labels(labels, num_classes)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    dtype = torch.get_default_dtype() if dtype is None else dtype
    check_dtype(dtype)
    return functional.one_hot(labels.long(), classes).to(dtype) - 1 / classes


class DirichletTargets(NamedTuple):
    """Regression targets for classes, and the variance of the noise of each."""

    targets: Tensor
    """`[N, C]`."""
    noise: Tensor
    """`[N, C]`."""


def dirichlet_targets(
    labels: Tensor, num_classes: int | None = None, alpha_epsilon: float = 0.01, dtype: torch.dtype | None = None
) -> DirichletTargets:
    """Log-normal stand-ins for the Gamma variables whose ratios are Dirichlet class probabilities.

    With α = ε for all classes but the label's, where it is 1 + ε, noise log(1 + 1/α) and target log α - noise / 2. The
    GPs' posterior N(mean, variance) of each output predicts E[softmax(f)]: `probabilities` of the mean and
    ``variance.diag_embed()`` with ``link="monte_carlo"``.

    Args:
        labels: Classes `[N]`, integers from 0 to C - 1.
        num_classes: C; by default one more than the largest label.
        alpha_epsilon: ε > 0; smaller ones say that a label is sure.
        dtype: Of the targets; by default torch's.

    Raises:
        InputError: As for `one_hot_targets`; or ``alpha_epsilon`` is not positive.

    Example:
        >>> import torch
        >>> from gpntk.likelihoods import dirichlet_targets
        >>> dirichlet_targets(torch.tensor([0, 2, 1]), num_classes=3).targets
        tensor([[-0.3341, -6.9127, -6.9127],
                [-6.9127, -6.9127, -0.3341],
                [-6.9127, -0.3341, -6.9127]])

    References:
        Milios et al. (2018), Dirichlet-based Gaussian Processes for Large-scale Calibrated Classification,
        https://arxiv.org/abs/1805.10915.
    """
    check_labels(labels, num_classes)
    check_positive(alpha_epsilon=alpha_epsilon)
    classes = int(labels.max()) + 1 if num_classes is None else num_classes
    dtype = torch.get_default_dtype() if dtype is None else dtype
    check_dtype(dtype)
    # As GPyTorch's DirichletClassificationLikelihood, which counts classes by the largest label that occurs.
    alpha = alpha_epsilon + functional.one_hot(labels.long(), classes).to(dtype)
    noise = alpha.reciprocal().log1p()
    return DirichletTargets(alpha.log() - noise / 2, noise)


def check_labels(labels: Tensor, num_classes: int | None = None) -> None:
    """Raise `InputError` unless ``labels`` are integers `[N]` from 0 to C - 1, with C >= 2 and N >= 1."""
    check_tensors(labels=labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"labels must be integers, got {labels.dtype}: pass labels.long().")
    if labels.dim() != 1 or not labels.numel():
        raise InputError(f"labels must be a vector of at least one class, got shape {tuple(labels.shape)}.")
    least, largest = int(labels.min()), int(labels.max())
    classes = largest + 1 if num_classes is None else num_classes
    check_count(num_classes=classes)
    if classes < 2:
        raise InputError(f"num_classes={classes}: a classification needs at least 2 classes.")
    if least < 0 or largest >= classes:
        wrong = least if least < 0 else largest
        raise InputError(f"labels has class {wrong}, but num_classes={classes} allows 0 to {classes - 1} only.")
