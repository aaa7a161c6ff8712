"""scikit-learn's face of classification on a frozen source network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, Self, final, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from gpntk._checks import check_choice
from gpntk.errors import InputError
from gpntk.estimators.arrays import as_array, kept, weights_of
from gpntk.estimators.base import Inputs, Kinds, TransferEstimator
from gpntk.estimators.labels import check_vector, class_names, positions
from gpntk.io import Contents
from gpntk.likelihoods import Link
from gpntk.transfer import TransferGP
from gpntk.transfer.labels import Likelihood

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
        classes: The labels in the order of the network's outputs, ``["cat", "dog"]``: one for each keeps its readout,
            another number replaces it. Default: integers from 0 stand for the outputs, present in y or not; any other
            labels are refused, unless ``new_head=True`` or ``num_classes=`` says what they are.
        num_classes: K, where y holds integers from 0 to K - 1, not all of them perhaps. If the network does not have K
            outputs, its readout is replaced.
        method: ``"laplace"``, Newton's method to the mode and a Gaussian there: for a network whose outputs are the
            classes, so that labels correct it. ``"dirichlet"``, regression on transformed labels, in closed form: for a
            new head, where Laplace's method is underconfident, and for quick looks. ``"auto"`` is the first or the
            second, by the head. For more inputs than either holds there is `gpntk.models.VariationalGP`.
        link: How probabilities are made of Gaussian logits: ``"probit"``, a formula; ``"monte_carlo"``, exact but for
            its draws; or ``"laplace_bridge"``, a formula that also gives a Dirichlet.
        network, mean, kernel, ...: The options that all transfer estimators share: see
            `gpntk.estimators.base.TransferEstimator`. The network's outputs are logits.

    Attributes:
        classes_: The classes `[K]`, sorted as scikit-learn's scorers take for granted.
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
        >>> model = gpntk.TransferClassifier(network, new_head=True).fit(x, x[:, 0] > x[:, 1])
        >>> model.predict_proba(x[:3]).shape, model.score(x, x[:, 0] > x[:, 1]) > 0.9
        ((3, 2), True)

    References:
        Maddox et al. (2021), Fast Adaptation with Linearized Neural Networks, https://arxiv.org/abs/2103.01439.
        Immer, Korzepa and Bauer (2021), Improving predictions of Bayesian neural nets via local linearization,
        https://arxiv.org/abs/2008.08400.
        Milios et al. (2018), Dirichlet-based Gaussian Processes for Large-scale Calibrated Classification,
        https://arxiv.org/abs/1805.10915.
    """

    classes: ArrayLike | None = None
    num_classes: int | None = None
    method: Method = "auto"
    link: Link = "probit"

    def fit(self, X: Inputs, y: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to inputs X `[N, ...]` and classes y `[N]`; returns self.

        Args:
            X: Inputs.
            y: Classes.
            sample_weight: What each label's log likelihood is multiplied by `[N]`, with ``method_="dirichlet"``. Zero
                leaves it out.

        Raises:
            InputError: An argument is none of its choices, or y does not say which class is which output: the message
                names the ways to say so.
            NetworkError, SelectionError: See `gpntk.FrozenNetwork`.
            ValueError: NaN, infinite or empty X or y, or different numbers of rows (scikit-learn's checks).
        """
        return self._fit(X, y, None, sample_weight)

    def _fit(self, X: Inputs, y: ArrayLike, there: ArrayLike | None, sample_weight: ArrayLike | None) -> Self:
        self._check_arguments()
        self._check_methods()
        with self._whole_or_not_at_all():
            inputs, labels = self._checked(X, y)
            weights = weights_of(sample_weight, len(labels))
            if there is not None:
                positions(labels, np.unique(there), "classes= does not have")
            x = self._prepare(inputs)
            names = class_names(
                labels if there is None else np.unique(there),
                self._network.num_outputs(x),
                classes=self.classes,
                num_classes=self.num_classes,
                new_head=self.new_head,
            )
            self._set_names(names)
            self._fit_model(self._transfer(*kept(weights, x, self._labels(labels))), stacklevel=4)
        if self.verbose:
            print(self.report_)  # noqa: T201
        return self

    def partial_fit(
        self,
        X: Inputs,
        y: ArrayLike,
        classes: ArrayLike | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Take more data in, hyperparameters as they are: the posterior of all data, at the cost of the new rows.

        Before `fit`, the same as `fit`, with ``classes`` as all labels that there will be, in any order.
        """
        if not hasattr(self, "_model"):
            return self._fit(X, y, classes, sample_weight)
        inputs, labels = self._checked(X, y, reset=False)
        self._check_shape(inputs)
        if classes is not None and len(np.setdiff1d(classes, self.classes_)):
            raise InputError(f"classes={classes} are not those of fit, {self.classes_}.")
        x, own, weights = kept(weights_of(sample_weight, len(labels)), self._packed(inputs), self._labels(labels))
        self._model = self._model.condition_on(x, own, weights=weights)
        self._finish()
        return self

    def predict_proba(self, X: Inputs) -> NDArray[Any]:
        """Probabilities of the classes at X `[N, ...]`: `[N, K]`, in the order of ``classes_``."""
        x = self._new_input(X)
        return self._model.probabilities(x, self.link).cpu().numpy()[:, self._order]

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

    def _checked(self, X: Any, y: Any, reset: bool = True) -> tuple[Any, NDArray[Any]]:
        y = as_array(y, "y")
        check_vector(y)
        inputs, labels = self._validate(X, y=y, reset=reset)
        check_classification_targets(labels)
        if any(label is None for label in labels):
            raise InputError("y has None for a class: leave these rows out, or give the class a name.")
        return inputs, labels

    def _check_methods(self) -> None:
        check_choice(get_args(Link), link=self.link)
        check_choice(get_args(Method), method=self.method)

    def _set_names(self, names: NDArray[Any]) -> None:
        """The classes in the order of the model's outputs."""
        self._names, self.classes_ = names, np.sort(names)
        self._order = np.argsort(names)

    def _labels(self, y: NDArray[Any]) -> Tensor:
        return torch.tensor(self._order[positions(y, self.classes_, "fit has not seen")], device=self._network.device)

    def _transfer(self, x: Tensor, labels: Tensor, weights: Tensor | None) -> TransferGP:
        classes = len(self._names)
        new_head = self.new_head or classes != max(2, self._network.num_outputs(x))
        self.method_ = ("dirichlet" if new_head else "laplace") if self.method == "auto" else self.method
        if weights is not None and self.method_ == "laplace":
            raise InputError("sample_weight does not go into method='laplace': take method='dirichlet', which has it.")
        likelihood: Likelihood = "dirichlet" if self.method_ == "dirichlet" else "categorical"
        return TransferGP(
            self._network,
            x,
            labels,
            likelihood=likelihood,
            num_classes=classes,
            new_head=new_head,
            weights=weights,
            **self._model_arguments(),
        )

    @classmethod
    def _own_options(cls) -> Mapping[str, Kinds]:
        return {"num_classes": (int, NoneType), "method": str, "link": str}

    def _facts(self) -> dict[str, Any]:
        return {"names": self._names.tolist(), "kind": self._names.dtype.str, "named": self.classes is not None}

    def _restore(self, data: Mapping[str, Tensor], facts: Contents) -> None:
        self._check_methods()
        names = facts.listed("fitted.names", (str, int, float, bool))
        try:
            self._set_names(np.array(names, dtype=facts.fact("fitted.kind", str)))
        except (TypeError, ValueError) as error:
            raise InputError(f"classes {names} cannot be read: {error}.") from None
        if self._names.tolist() != names or len(set(names)) < max(2, len(names)):
            raise InputError(f"classes {names} are not {len(names)} different ones of {self._names.dtype}.")
        self.classes = self._names if facts.fact("fitted.named", bool) else None
        self._model = self._transfer(data["x"], data["labels"], data.get("weights"))
