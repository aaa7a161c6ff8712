"""Training a wide or linearized network in closed form: predictions at any time of gradient descent, with covariance.

A network that is linear in its weights, f_t(x) = f_0(x) + J(x) ω_t, has a training trajectory that is known without
training. It lies in the span of the features of the data, so that all there is to know are the dual coefficients c_t:

    ω_t = J(X)ᵀ c_t,   f_t(x) = f_0(x) + Θ(x, X) c_t,   Θ = J Jᵀ the neural tangent kernel,

which for the squared loss are c_t = P_t (y - f_0(X)) with P_t = p_t(Θ) a function of one matrix, and for the
cross-entropy the solution of an ordinary differential equation. Over random initializations, f_0 is a Gaussian process
with kernel K, and so is f_t. The parts: `gpntk.dynamics.filters` has p_t, `matrix_functions` applies it,
`cross_entropy` integrates; here they meet kernels and data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from gpntk._checks import check_choice, check_count, check_flags, check_functions, check_not_negative, check_positive
from gpntk.dynamics.cross_entropy import cross_entropy_coefficients
from gpntk.dynamics.filters import GradientFilter
from gpntk.dynamics.matrix_functions import Filtered
from gpntk.dynamics.training_kernel import (
    FilterSettings,
    Method,
    OutputLayout,
    TrainingKernel,
    as_outputs,
    check_test_inputs,
    check_training_data,
    feature_kernel,
    kernel_functions,
)
from gpntk.errors import InputError
from gpntk.inference.features import exact_dtype
from gpntk.infinite import InfiniteKernels

Loss = Literal["mse", "cross_entropy"]
# Largest curvature of a loss in an output, by loss and whether there is but one output.
_CURVATURE = {("mse", True): 1.0, ("mse", False): 1.0, ("cross_entropy", True): 0.25, ("cross_entropy", False): 0.5}


class FlowPrediction(NamedTuple):
    """Predictions at one time, or at T times in a leading dimension.

    Attributes:
        mean: E f_t(x) `[M]`, or `[M, C]` for targets `[N, C]`; of a single network f_t(x) itself.
        covariance: Covariance of f_t(x) over initializations: `[M, M]`, for a kernel shared by the outputs that of each
            of them, else `[M*C, M*C]` with rows m*C + c. None for a single network.
        error: What Lanczos and rounding may have added to the mean on the training set, at each time, in units of the
            norm of y - f_0(X). At another x* it is up to (Θ(x*, x*)/s)^½ times that. None without Lanczos.
    """

    mean: Tensor
    covariance: Tensor | None
    error: Tensor | None


@final
class GradientFlow:
    """Networks in the course of their training on (x, y), without training them.

    Exact for a network that is linear in its weights, as an infinitely wide or a linearized one is, and that is trained
    by full-batch gradient flow or descent. A network of finite width deviates by O(1/√width) from the kernels of the
    limit; from its own kernel, taken where it starts, in practice by about 1/width. What is predicted depends on what
    is given:

    * ``nngp`` given: an ensemble over initializations. f_t(x*) is Gaussian with (Θ* = Θ(x*, X), K* alike)

          mean        Θ* P_t y,
          covariance  K** + Θ* P_t K P_t Θ*ᵀ - (Θ* P_t K*ᵀ + transpose).

    * ``initial`` given: a single network that starts at f_0, f_t(x*) = f_0(x*) + Θ* P_t (y - f_0(X)), with the weights'
      move from `weights`. Take ``ntk=NTKKernel(network)`` and ``initial=NetworkMean(network)``.
    * both: an ensemble whose f_0 has mean ``initial``.
    * neither: a single network with f_0 = 0, or the mean of an ensemble.

    Loss: ``loss="mse"`` is L = ½ Σ_nc (f_c(x_n) - y_nc)², ``"cross_entropy"`` is L = -Σ_n log softmax(f(x_n))[y_n];
    ``normalize`` divides by N*C and by N. (PyTorch's ``MSELoss()`` is twice the normalized loss: double the rate.)
    Cross-entropy has no formula: c' = η (Y - softmax(f_0(X) + Θ c) - s c) is integrated, by LSODA to ``tolerance``;
    discrete steps are taken one by one. Either starts from t = 0 at every call.

    Time: t counts steps of ``learning_rate`` η. The flow is ω' = -η ∂L/∂ω, so that t steps of descent and the flow at t
    agree to first order in η, and the mode of Θ with eigenvalue λ is learned at about t = 1/(η λ), with momentum μ at
    (1 - μ)/(η λ).

    A noise s = ``noise`` + ``diag_reg`` * trace/n adds (s/2) ‖ω‖² to L, weight decay towards the initial weights:
    Θ + s I takes the place of Θ in P_t. The trace is that of the kernel which is inverted, Θ or K.

    In neural-tangents' words: ``predict`` is get="ntk", ``predict(trained="readout")`` get="nngp",
    ``posterior(prior="nngp")`` get="nngp" with t=None, ``posterior(prior="ntk")`` get="ntkgp";
    ``gradient_descent_mse_ensemble`` has ``normalize=True``, its ``diag_reg`` is ours, and with
    ``diag_reg_absolute_scale`` it is our ``noise``. There, predictions on the training set (``x_test=None``) count the
    noise as part of the kernel; here they are those for any other x.

    Cost: one eigendecomposition, 9 n³ operations, for all t, or k products with the kernel matrix by Lanczos.

    Args:
        ntk: Θ, any GPyTorch kernel with one row per input (shared by all outputs) or C of them (rows n*C + c). Kernels
            are copied, with the hyperparameters they have. Or both kernels of an infinitely wide network, as
            `gpntk.infinite.kernels` gives them: then K is known too, and both are computed in one pass.
        x: Training inputs `[N, D]`.
        y: Targets `[N]` or `[N, C]`. For the cross-entropy: classes, integers `[N]`; or their probabilities `[N, C]`,
            or `[N]` for a single logit.
        nngp: K, the kernel of the networks at initialization; makes it an ensemble.
        learning_rate: η.
        loss: ``"mse"`` or ``"cross_entropy"``.
        noise: s, a variance in the units of the kernel.
        initial: f_0, a function from x `[M, D]` to `[M]` or `[M, C]`.
        diag_reg: Noise relative to the mean diagonal of the kernel.
        normalize: Take the mean loss instead of the sum.
        discrete: Steps of gradient descent instead of its flow; t is then whole.
        momentum: μ of ``torch.optim.SGD``, for discrete steps.
        method: ``"dense"``, ``"lanczos"``, which asks for products with kernels only, or ``"auto"``: dense up to 4,096
            rows. Only dense covariances are differentiable; means are so either way, in x*.
        tolerance: Error of Lanczos, see ``FlowPrediction.error``, and of the integration for the cross-entropy.
        max_iterations: Most iterations of Lanczos.

    Raises:
        InputError: Shapes, values or the combination of arguments make no sense; the message says what to change.

    Example:
        >>> import torch, gpytorch, gpntk
        >>> x = torch.linspace(0, 1, 6, dtype=torch.float64).unsqueeze(-1)
        >>> kernel = gpytorch.kernels.RBFKernel().double()
        >>> flow = gpntk.GradientFlow(kernel, x, x.squeeze(-1).sin(), nngp=kernel, noise=0.01)
        >>> flow.predict(x[:2], t=[0.0, 10.0, float("inf")]).mean.shape
        torch.Size([3, 2])

        Steps of descent with momentum, and their largest rate:

        >>> steps = gpntk.GradientFlow(kernel, x, x.squeeze(-1).sin(), learning_rate=0.3, discrete=True, momentum=0.9)
        >>> round(steps.max_learning_rate(), 2), steps.predict(x[:2], t=[10, 500]).mean.shape
        (0.77, torch.Size([2, 2]))

        Classes, by the cross-entropy flow; the mean holds logits:

        >>> classes = (x.squeeze(-1) > 0.5).long()
        >>> logits = gpntk.GradientFlow(kernel, x, classes, loss="cross_entropy").predict(x, t=100.0).mean
        >>> bool((logits.argmax(-1) == classes).all())
        True

        A network that is linear in its weights, after infinite time, and where they are then:

        >>> network = torch.nn.Linear(1, 1).double()
        >>> kernel, f0 = gpntk.NTKKernel(network), gpntk.NetworkMean(network)
        >>> flow = gpntk.GradientFlow(kernel, x, 2 - x.squeeze(-1), initial=f0)
        >>> moved = gpntk.freeze(network).unflatten(flow.weights())
        >>> print(f"{network.weight.item() + moved['weight'].item():.6f}")
        -1.000000

    References:
        Lee et al. (2019), Wide Neural Networks of Any Depth Evolve as Linear Models Under Gradient Descent,
        https://arxiv.org/abs/1902.06720, eqs. 8 to 15.
        He, Lakshminarayanan et al. (2020), Bayesian Deep Ensembles via the Neural Tangent Kernel,
        https://arxiv.org/abs/2007.05864, on how the ensemble differs from the posterior.
    """

    def __init__(
        self,
        ntk: Kernel | InfiniteKernels,
        x: Tensor,
        y: Tensor,
        nngp: Kernel | None = None,
        learning_rate: float = 1.0,
        *,
        loss: Loss = "mse",
        noise: float = 0.0,
        initial: Callable[[Tensor], Any] | None = None,
        diag_reg: float = 0.0,
        normalize: bool = False,
        discrete: bool = False,
        momentum: float = 0.0,
        method: Method = "auto",
        tolerance: float = 1e-12,
        max_iterations: int = 1000,
    ) -> None:
        check_choice(("mse", "cross_entropy"), loss=loss)
        check_choice(get_args(Method), method=method)
        check_positive(learning_rate=learning_rate)
        check_positive(1.0, tolerance=tolerance)
        check_not_negative(noise=noise, diag_reg=diag_reg)
        check_not_negative(1.0, momentum=momentum)
        check_count(max_iterations=max_iterations)
        check_flags(normalize=normalize, discrete=discrete)
        if momentum and not discrete:
            raise InputError(f"momentum={momentum} is that of discrete steps: pass discrete=True.")
        if initial is not None:
            check_functions(initial=initial)
        check_training_data(x, y, loss)
        if loss == "cross_entropy" and nngp is not None:
            raise InputError("with the cross-entropy f_t is not Gaussian: leave nngp out, and give initial=f_0.")
        self._x, self._initial, self._loss, self._tolerance = x.detach(), initial, loss, tolerance
        self._exact = exact_dtype(x.device)
        settings = FilterSettings(method, noise, diag_reg, tolerance, max_iterations)
        theta, prior = kernel_functions(ntk, nngp)
        self._ntk = TrainingKernel(theta, self._x, settings)
        # Of the cross-entropy no covariance is known.
        self._nngp = None if prior is None or loss != "mse" else TrainingKernel(prior, self._x, settings)
        self._start, self._targets, self._layout = self._targets_of(y)
        self._mean_over = (y.shape[0] if loss == "cross_entropy" else self._targets.numel()) if normalize else 1
        self._rate = learning_rate
        self._filter = GradientFilter(learning_rate / self._mean_over, momentum, discrete)

    def __repr__(self) -> str:
        kind = "single network" if self._nngp is None else "ensemble"
        return f'GradientFlow({len(self._x):,} inputs, "{self._loss}", {kind})'

    def predict(
        self,
        x: Tensor,
        t: float | Sequence[float] | Tensor = math.inf,
        *,
        trained: Literal["all", "readout"] = "all",
        covariance: bool = True,
    ) -> FlowPrediction:
        """f_t(x) for x `[M, D]`, at one time t or at each of several.

        Args:
            x: Inputs `[M, D]`; means are differentiable in them.
            t: Time in units of the learning rate, or number of steps if ``discrete``; at infinity, when all is learned.
            trained: ``"all"`` layers, or the ``"readout"`` only, for which K takes the place of Θ. The targets of each
                readout are then taken to carry their own noise s, so that for t = ∞ the covariance is that of
                ``posterior(prior="nngp")``.
            covariance: Whether to compute the covariance of an ensemble.

        Raises:
            InputError: t is negative, not whole for discrete steps, or infinite for the cross-entropy; descent diverges
                at the learning rate; x does not fit.
            SolveError: Lanczos or the integration did not reach the tolerance.
        """
        check_choice(("all", "readout"), trained=trained)
        check_flags(covariance=covariance)
        train = self._ntk if trained == "all" else self._required_nngp("trained='readout'")
        prior = self._nngp if covariance else None
        return self._predict(x, t, train, prior, function=self._filter, noisy=trained == "readout")

    def posterior(self, x: Tensor, prior: Literal["nngp", "ntk"] = "nngp") -> FlowPrediction:
        """The Bayesian posterior of f(x) for x `[M, D]`, f ~ GP(f_0, prior), y = f(X) + N(0, s).

        Mean f_0* + k* (k + s I)⁻¹ (y - f_0(X)), covariance k** - k* (k + s I)⁻¹ k*ᵀ. With ``prior="nngp"`` it is also
        the ensemble of readouts trained for ever; with ``"ntk"``, what an ``ExactGP`` with that kernel predicts, and no
        ensemble of plain networks does.
        """
        check_choice(("nngp", "ntk"), prior=prior)
        if self._loss != "mse":
            raise InputError("the posterior is in closed form for loss='mse' only.")
        kernel = self._ntk if prior == "ntk" else self._required_nngp("prior='nngp'")
        return self._predict(x, math.inf, kernel, kernel, function=GradientFilter(1.0), noisy=True)

    def coefficients(self, t: float | Sequence[float] | Tensor = math.inf) -> Tensor:
        """c_t of f_t(x) = f_0(x) + Θ(x, X) c_t: shaped as the targets are, `[N]` or `[N, C]`, times in front."""
        times, several = self._times(t)
        value = self._layout.outputs(self._filtered(self._ntk, self._filter, times).value).to(self._x.dtype)
        return value if several else value[0]

    def weights(self, t: float | Sequence[float] | Tensor = math.inf) -> Tensor:
        """ω_t = S J(X)ᵀ c_t `[F]`, how far the weights have moved; times in front, a column each for shared kernels.

        The layout is the kernel's, ``kernel.network.unflatten(ω)`` names the parts. S are the kernel's prior variances,
        one unless it has ``layer_variances`` or a ``ScaleKernel`` around it; in the metric S the flow goes down.
        """
        kernel, scale = feature_kernel(self._ntk.function.kernel)
        times, several = self._times(t)
        value = self._filtered(self._ntk, self._filter, times).value
        with torch.no_grad():
            moved: Any = kernel.features(self._x).mT @ value.flatten(0, 1).mT.to(self._x.dtype)
            variances = kernel.layer_variances.squeeze(-1).to(self._x)
            groups = kernel.backend.feature_groups(self._x.device)
            variances = variances[groups] if variances.numel() > 1 else variances
            moved = (scale * variances.unsqueeze(-1) * moved).mT.unflatten(0, value.shape[:2]).mT
        moved = moved.squeeze(-1) if moved.shape[-1] == 1 else moved
        return moved if several else moved[0]

    def max_learning_rate(self) -> float:
        """The rate from which discrete steps diverge, 2 (1 + μ)/(λ_max + s), for the loss at hand.

        For the cross-entropy, whose curvature is at most ½ (¼ for one logit), descent converges below it.
        """
        curvature = _CURVATURE[self._loss, self._layout.num_outputs == 1]
        steepest = curvature * self._ntk.matrix.largest_eigenvalue() + self._ntk.noise
        return self._filter.largest_rate(steepest) * self._mean_over

    def _targets_of(self, y: Tensor) -> tuple[Tensor, Tensor, OutputLayout]:
        """f_0(X) and Y `[N, C]`, and how they are laid out."""
        classes = not y.is_floating_point()
        with torch.no_grad():
            start = None if self._initial is None else as_outputs(self._initial(self._x), self._x, "initial(x)")
        outputs = 1 if y.dim() == 1 else y.shape[-1]
        if classes:
            if start is not None and start.shape[-1] <= int(y.max()):
                hint = ": for a single logit give y.double()" if start.shape[-1] == int(y.max()) == 1 else ""
                raise InputError(f"y has class {int(y.max())} and initial(x) only {start.shape[-1]} output(s){hint}.")
            full = self._ntk.rows // y.shape[0]
            outputs = start.shape[-1] if start is not None else max(full, int(y.max()) + 1)
            y = torch.nn.functional.one_hot(y.long(), outputs)
        targets = y.detach().reshape(-1, outputs).to(self._exact)
        start = torch.zeros_like(targets) if start is None else start.to(self._exact)
        if start.shape != targets.shape:
            raise InputError(f"initial(x) has shape {tuple(start.shape)} and y {tuple(y.shape)}: they must agree.")
        layout = OutputLayout.of(self._ntk.rows, targets, y.dim() == 1)
        if self._nngp is not None and self._nngp.rows != self._ntk.rows:
            raise InputError(f"nngp has {self._nngp.rows} rows and ntk {self._ntk.rows}: give kernels of one kind.")
        return start, targets, layout

    def _times(self, t: float | Sequence[float] | Tensor) -> tuple[Tensor, bool]:
        """t `[T]`, and whether there is a dimension of times."""
        try:
            times = torch.as_tensor(t, dtype=self._exact, device=self._x.device).detach()
        except (TypeError, ValueError, RuntimeError):
            raise InputError(f"t={t!r}: give one number or a sequence of them.") from None
        if times.dim() > 1 or not times.numel():
            raise InputError(f"t must be one number or a sequence of them, got shape {tuple(times.shape)}.")
        if not bool((times >= 0).all()):
            raise InputError(f"t must not be negative or NaN, got {times.min().item()}: training starts at t = 0.")
        finite = times[times.isfinite()]
        if self._filter.discrete and not bool(((finite == finite.round()) & (finite <= 2.0**53)).all()):
            raise InputError("with discrete=True t counts steps: give whole numbers, or leave discrete out.")
        if self._loss != "mse" and finite.numel() < times.numel():
            raise InputError("the cross-entropy flow needs a finite t: on separable data it has no limit.")
        return times.reshape(-1), times.dim() == 1

    @cached_property
    def _residual(self) -> Tensor:
        """Y - f_0(X) as columns `[K, n]`."""
        return self._layout.columns(self._targets - self._start)

    def _filtered(self, kernel: TrainingKernel, function: GradientFilter, times: Tensor) -> Filtered:
        """c_t as columns `[T, K, n]`."""
        layout = self._layout
        if self._loss == "mse":
            self._check_rate(kernel, function)
            return kernel.matrix.filtered(function, kernel.noise, times, self._residual)

        def product(c: Tensor) -> Tensor:
            return layout.matrix(kernel.matrix.product(layout.columns(c)))

        coefficients = cross_entropy_coefficients(
            product, self._start, self._targets, function, times, noise=kernel.noise, tolerance=self._tolerance
        )
        return Filtered(torch.stack([layout.columns(c) for c in coefficients]), None)

    def _check_rate(self, kernel: TrainingKernel, function: GradientFilter) -> None:
        if not function.discrete:
            return
        largest = function.largest_rate(kernel.matrix.largest_eigenvalue() + kernel.noise)
        if function.rate >= largest:
            raise InputError(
                f"learning_rate={self._rate:g} makes descent diverge: it must be below {largest * self._mean_over:.6g}."
            )

    def _required_nngp(self, what: str) -> TrainingKernel:
        if self._nngp is None:
            raise InputError(f"{what} needs the kernel of the readout: give nngp.")
        return self._nngp

    def _predict(
        self,
        x: Tensor,
        t: float | Sequence[float] | Tensor,
        train: TrainingKernel,
        prior: TrainingKernel | None,
        *,
        function: GradientFilter,
        noisy: bool,
    ) -> FlowPrediction:
        check_test_inputs(x, self._x)
        times, several = self._times(t)
        value, error = self._filtered(train, function, times)
        moved = self._layout.outputs(train.predictions(x, value))
        start = 0.0
        if self._initial is not None:
            start = as_outputs(self._initial(x), x, "initial(x)").to(self._exact)
            start = start.squeeze(-1) if self._layout.vector else start
        mean = (moved + start).to(x.dtype)
        spread = None if prior is None else train.filtered_covariance(x, times, prior, function, noisy).to(x.dtype)
        if several:
            return FlowPrediction(mean, spread, error)
        return FlowPrediction(mean[0], None if spread is None else spread[0], None if error is None else error[0])
