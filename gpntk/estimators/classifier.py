"""scikit-learn's face of classification on a frozen source network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, Self, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from gpntk.errors import InputError
from gpntk.estimators.base import Inputs, TransferEstimator
from gpntk.likelihoods import LINKS, Link
from gpntk.transfer import TransferGP
from gpntk.transfer.gp import Likelihood

Method = Literal["auto", "laplace", "dirichlet"]
"""How the posterior is approximated; see `TransferClassifier`."""


@final
@dataclass(eq=False, repr=False, kw_only=True)
class TransferClassifier(ClassifierMixin, TransferEstimator):
    """Gaussian process classification in the tangent space of a pretrained network.

    The network is frozen; the posterior over small moves of its weights is found without training. Use it with a
    network trained on a related task and few target labels. Nothing is tuned or held out: kernel and hyperparameters
    are inferred from their posterior. `report_` says whether the source network helps.

    Args:
        num_classes: K, if there are more classes than y shows; y then holds integers from 0 to K - 1. A network with
            another number of outputs gets a new head. Default: as many as y has values.
        method: ``"laplace"``, Newton's method to the mode and a Gaussian there: for a network whose outputs are the
            classes, so that labels correct it. ``"dirichlet"``, regression on transformed labels, in closed form: for a
            new head, where Laplace's method is underconfident, and for quick looks. ``"auto"`` is the first or the
            second, by the head. For more inputs than either holds there is `gpntk.models.VariationalGP`.
        link: How probabilities are made of Gaussian logits: ``"probit"``, a formula; ``"monte_carlo"``, exact but for
            its draws; or ``"laplace_bridge"``, a formula that also gives a Dirichlet.
        network, mean, kernel, ...: The options that all transfer estimators share: see
            `gpntk.estimators.base.TransferEstimator`. The network's outputs are logits.

    Attributes:
        classes_: The classes `[K]`.
        log_marginal_likelihood_: Log evidence of the labels of `fit` at the best hyperparameters, in nats; that of the
            method.
        hyperparameters_: Best hyperparameters by name.
        kernel_: Name of the kernel in use.
        method_: The method in use.
        report_: See `gpntk.transfer.report.Report`.
        n_features_in_: Size of the second dimension of X in `fit`.

    Example:
        >>> import torch, gpntk
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> network = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))
        >>> x = torch.rand(40, 2).numpy()
        >>> model = gpntk.TransferClassifier(network).fit(x, x[:, 0] > x[:, 1])
        >>> model.predict_proba(x[:3]).shape, model.score(x, x[:, 0] > x[:, 1]) > 0.9
        ((3, 2), True)

    References:
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, https://arxiv.org/abs/2103.01439.
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
        https://arxiv.org/abs/2008.08400.
        Milios et al. (2018), Dirichlet-based Gaussian Processes for Large-scale Calibrated Classification,
        https://arxiv.org/abs/1805.10915.
    """

    num_classes: int | None = None
    method: Method = "auto"
    link: Link = "probit"

    def fit(self, X: Inputs, y: ArrayLike) -> Self:
        """Fit to inputs X `[N, ...]` and classes y `[N]`; returns self.

        Raises:
            InputError: An argument is none of its choices, y has a single class, or a class out of range.
            NetworkError, SelectionError: See `gpntk.FrozenNetwork`.
            ValueError: NaN, infinite or empty X or y, or different numbers of rows (scikit-learn's checks).
        """
        return self._fit(X, y, None)

    def _fit(self, X: Inputs, y: ArrayLike, classes: ArrayLike | None) -> Self:
        self._check_arguments()
        if self.link not in LINKS:
            raise InputError(f"link={self.link!r}: choose one of {', '.join(map(repr, LINKS))}.")
        if self.method not in ("auto", "laplace", "dirichlet"):
            raise InputError(f"method={self.method!r}: choose 'auto', 'laplace' or 'dirichlet'.")
        if not (self.num_classes is None or isinstance(self.num_classes, Integral)):
            raise InputError(f"num_classes={self.num_classes!r}: give an integer.")
        with self._whole_or_not_at_all():
            inputs, labels = self._validate(X, y=y)
            check_classification_targets(labels)
            self.classes_ = self._classes(labels) if classes is None else np.unique(classes)
            x = self._prepare(inputs)
            self._fit_model(self._transfer(x, self._labels(labels)))
        if self.verbose:
            print(self.report_)  # noqa: T201
        return self

    def partial_fit(self, X: Inputs, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Take more data in, hyperparameters as they are: the posterior of all data, at the cost of the new rows.

        Before `fit`, the same as `fit`, with ``classes`` as the classes there are; later they must be the same.
        """
        if not hasattr(self, "_model"):
            return self._fit(X, y, classes)
        inputs, labels = self._validate(X, y=y, reset=False)
        self._check_shape(inputs)
        if classes is not None and not np.array_equal(np.asarray(classes), self.classes_):
            raise InputError(f"classes={classes} are not those of fit, {self.classes_}.")
        self._model = self._model.condition_on(self._packed(inputs), self._labels(labels))
        self._finish()
        return self

    def predict_proba(self, X: Inputs) -> NDArray[Any]:
        """Probabilities of the classes at X `[N, ...]`: `[N, K]`, in the order of ``classes_``."""
        x = self._new_input(X)
        return self._model.probabilities(x, self.link).cpu().numpy()

    def predict(self, X: Inputs) -> NDArray[Any]:
        """The most probable class at X `[N, ...]`: `[N]`."""
        most_probable = self.predict_proba(X).argmax(-1)
        return self.classes_[most_probable]

    def decision_function(self, X: Inputs) -> NDArray[Any]:
        """Log probabilities `[N, K]`; for two classes the log odds of the second `[N]`."""
        tiny = np.finfo(self.dtype).tiny
        logs = np.log(np.maximum(self.predict_proba(X), tiny))
        return logs[:, 1] - logs[:, 0] if len(self.classes_) == 2 else logs

    # --- private -----------------------------------------------------------------------------------------------

    def _classes(self, y: NDArray[Any]) -> NDArray[Any]:
        seen = np.unique(y)
        if self.num_classes is None or len(seen) == self.num_classes:
            if len(seen) < 2:
                raise InputError(f"y has one class only, {seen[0]}: give labels of at least two, or num_classes.")
            return seen
        if len(seen) > self.num_classes:
            raise InputError(f"y has {len(seen)} classes, more than num_classes={self.num_classes}.")
        if self.num_classes < 2:
            raise InputError(f"num_classes={self.num_classes}: a classification needs at least 2 classes.")
        numbers = np.arange(self.num_classes)
        if y.dtype.kind not in "iu" or not np.isin(seen, numbers).all():
            raise InputError(
                f"y has {len(seen)} classes, {seen.tolist()[:10]}, but num_classes={self.num_classes}: with classes "
                f"missing from y, give labels as integers from 0 to {self.num_classes - 1}."
            )
        return numbers

    def _labels(self, y: NDArray[Any]) -> Tensor:
        unknown = np.setdiff1d(y, self.classes_)
        if len(unknown):
            raise InputError(
                f"y has classes {unknown.tolist()[:10]}, which fit has not seen: {self.classes_.tolist()}."
            )
        return torch.tensor(np.searchsorted(self.classes_, y), device=self._network.device)

    def _transfer(self, x: Tensor, labels: Tensor) -> TransferGP:
        classes, outputs = len(self.classes_), self._network.num_outputs(x)
        matching = outputs == classes or (outputs == 1 and classes == 2)
        new_head = self.new_head or not matching
        self.method_ = ("dirichlet" if new_head else "laplace") if self.method == "auto" else self.method
        likelihood: Likelihood = "dirichlet" if self.method_ == "dirichlet" else "categorical"
        return TransferGP(
            self._network,
            x,
            labels,
            likelihood=likelihood,
            num_classes=classes,
            new_head=new_head,
            **self._model_arguments(),
        )

    @classmethod
    def _own_options(cls) -> tuple[str, ...]:
        return ("num_classes", "method", "link")

    def _facts(self) -> dict[str, Any]:
        kind = self.classes_.dtype
        return {"classes": self.classes_.tolist(), "kind": kind.str}

    def _restore(self, data: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.classes_ = np.array(facts["classes"], dtype=facts["kind"])
        self._model = self._transfer(data["x"], data["labels"])
