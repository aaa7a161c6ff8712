"""scikit-learn's face of classification on a frozen source network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor, nn

from gpntk._types import Extract, ParameterSelection
from gpntk.errors import InputError
from gpntk.estimators.base import TransferEstimator
from gpntk.inference.hyperposterior import Treatment
from gpntk.likelihoods import LINKS, Link
from gpntk.transfer.classification import Method, TransferClassification
from gpntk.transfer.components import StationaryForm
from gpntk.transfer.prior import KernelChoice, MeanChoice, StationaryInputs
from gpntk.transfer.report import Report, report_classification


@final
class TransferClassifier(ClassifierMixin, TransferEstimator):
    """Gaussian process classification in the tangent space of a pretrained network.

    The network is frozen; the posterior over small moves of its weights is found without training. Use it with a
    network trained on a related task and few target labels. Nothing is tuned or held out: kernel and hyperparameters
    are inferred from their posterior. `report_` says whether the source network helps.

    Args:
        network: The source network, in eval mode; its outputs are logits. It is copied when `fit` is called and never
            changed.
        num_classes: K, if there are more classes than y shows; y then holds integers from 0 to K - 1. A network with
            another number of outputs gets a new head. Default: as many as y has values.
        mean: Prior mean of the logits: ``"network"``, its own; ``"constant"``, one number per class; or ``"zero"``.
            ``"auto"`` is the network's, or zero under a new head.
        kernel: As for `gpntk.TransferRegressor`.
        new_head: Replace the readout by a fresh one even though the number of classes is that of the network's outputs,
            because they mean something else.
        method: ``"laplace"``, Newton's method to the mode and a Gaussian there: for a network whose outputs are the
            classes, so that labels correct it. ``"dirichlet"``, regression on transformed labels, in closed form: for a
            new head, where Laplace's method is underconfident, and for quick looks. ``"variational"``, inducing points
            and mini-batches: for more inputs. ``"auto"`` is the first or the second up to 2,000 inputs, by the head,
            and the third beyond.
        link: How probabilities are made of Gaussian logits: ``"probit"``, a formula; ``"monte_carlo"``, exact but for
            its draws; or ``"laplace_bridge"``, a formula that also gives a Dirichlet.
        parameters: As for `gpntk.TransferRegressor`.
        layer_variances: Learn one prior variance per layer instead of a single one.
        stationary: Form of the stationary kernel, ``"rbf"`` or ``"matern"`` (5/2).
        stationary_inputs: What it compares: ``"inputs"``, or the ``"features"`` that enter the readout. Default: the
            inputs, or with ``kernel="auto"`` the better one.
        hyperparameters: ``"average"`` over their posterior, put them at its ``"maximum"``, or ``"auto"``: the first. Or
            a mapping with values to be kept, by their names in ``hyperparameters_``.
        input_shape: Shape of one input as the network wants it. Default: the shape of the rows of X.
        extract: Turns what the network returns into its logits `[N]` or `[N, C]`.
        dtype: Precision of Jacobians and of the GP, ``"float64"`` or ``"float32"``; the network's outputs and features
            are computed in its own.
        verbose: Print the report after `fit`.

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

    _stored = ("num_classes", "method", "link")

    def __init__(
        self,
        network: nn.Module,
        *,
        num_classes: int | None = None,
        mean: MeanChoice = "auto",
        kernel: KernelChoice = "auto",
        new_head: bool = False,
        method: Method = "auto",
        link: Link = "probit",
        parameters: ParameterSelection = None,
        layer_variances: bool = False,
        stationary: StationaryForm = "rbf",
        stationary_inputs: StationaryInputs | None = None,
        hyperparameters: Treatment | Mapping[str, float] = "auto",
        input_shape: Sequence[int] | None = None,
        extract: Extract | None = None,
        dtype: Literal["float64", "float32"] = "float64",
        verbose: bool = False,
    ) -> None:
        self.network = network
        self.num_classes = num_classes
        self.mean: MeanChoice = mean
        self.kernel: KernelChoice = kernel
        self.new_head = new_head
        self.method: Method = method
        self.link: Link = link
        self.parameters = parameters
        self.layer_variances = layer_variances
        self.stationary: StationaryForm = stationary
        self.stationary_inputs: StationaryInputs | None = stationary_inputs
        self.hyperparameters = hyperparameters
        self.input_shape = input_shape
        self.extract = extract
        self.dtype: Literal["float64", "float32"] = dtype
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Fit to inputs X `[N, ...]` and classes y `[N]`; returns self.

        Raises:
            InputError: An argument is none of its choices, y has a single class, or a class out of range.
            NetworkError, SelectionError: See `gpntk.FrozenNetwork`.
            ValueError: NaN, infinite or empty X or y, or different numbers of rows (scikit-learn's checks).
        """
        return self._fit(X, y, None)

    def _fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None) -> Self:
        self._check_arguments()
        if self.link not in LINKS:
            raise InputError(f"link={self.link!r}: choose one of {', '.join(map(repr, LINKS))}.")
        with self._whole_or_not_at_all():
            inputs, labels = self._validate(X, y=y)
            check_classification_targets(labels)
            self.classes_ = self._classes(labels) if classes is None else np.unique(classes)
            self._row_shape = inputs.shape[1:]
            self._network = self._freeze()
            self._model = self._transfer(self._tensor(inputs), self._labels(labels))
            self.log_marginal_likelihood_ = self._model.fit()
            self._finish()
        if self.verbose:
            print(self.report_)  # noqa: T201
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Take more data in, hyperparameters as they are: the posterior of all data, at the cost of the new rows.

        Before `fit`, the same as `fit`, with ``classes`` as the classes there are; later they must be the same. Not for
        the variational method, which has to be fitted anew.
        """
        if not hasattr(self, "_model"):
            return self._fit(X, y, classes)
        inputs, labels = self._validate(X, y=y, reset=False)
        self._check_shape(inputs)
        if classes is not None and not np.array_equal(np.asarray(classes), self.classes_):
            raise InputError(f"classes={classes} are not those of fit, {self.classes_}.")
        self._model = self._model.condition_on(self._tensor(inputs), self._labels(labels))
        self._finish()
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[Any]:
        """Probabilities of the classes at X `[N, ...]`: `[N, K]`, in the order of ``classes_``."""
        x = self._new_input(X)
        return self._model.predict(x, self.link).cpu().numpy()

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """The most probable class at X `[N, ...]`: `[N]`."""
        most_probable = self.predict_proba(X).argmax(-1)
        return self.classes_[most_probable]

    def decision_function(self, X: ArrayLike) -> NDArray[Any]:
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

    def _transfer(self, x: Tensor, labels: Tensor, method: Method | None = None) -> TransferClassification:
        classes, outputs = len(self.classes_), self._probe(x)
        matching = outputs == classes or (outputs == 1 and classes == 2)
        fresh = self.new_head or not matching
        arguments = {**self._model_arguments(), "fresh": fresh, "method": method or self.method}
        return TransferClassification(self._network, x, labels, classes, **arguments)

    def _data(self) -> dict[str, Tensor]:
        return {"x": self._model.x, "labels": self._model.labels}

    def _facts(self) -> dict[str, Any]:
        kind = self.classes_.dtype
        return {"classes": self.classes_.tolist(), "kind": kind.str, "method": self._model.method}

    def _restore(self, data: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        self.classes_ = np.array(facts["classes"], dtype=facts["kind"])
        self._model = self._transfer(data["x"], data["labels"], facts["method"])

    def _finish(self) -> None:
        super()._finish()
        self.method_ = self._model.method

    def _make_report(self) -> Report:
        return report_classification(self._model)
