"""Training a linear(ized) model by gradient flow or descent on the cross-entropy, in function space.

With f_t = f_0 + A c_t, weights ω_t = Jᵀ c_t and A = J Jᵀ, the gradient of the loss Σ_n ℓ(y_n, f(x_n)) + (s/2) ‖ω‖² with
respect to the weights is Jᵀ of what c follows:

    c' = η (Y - softmax(f_0 + A c) - s c),   c_0 = 0.

There is no closed form: the flow is integrated, descent is done step by step. One trajectory of c gives the predictions
everywhere, f_t(x) = f_0(x) + a(x)ᵀ c_t.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from gpntk.dynamics.filters import GradientFilter
from gpntk.errors import SolveError

# Finer, the integrator gains nothing.
_FINEST = 1e-10


def probabilities(f: Tensor) -> Tensor:
    """softmax(f) `[..., C]`; for C = 1, where f is the logit of one class against the other, its sigmoid."""
    return f.sigmoid() if f.shape[-1] == 1 else f.softmax(-1)


def cross_entropy_coefficients(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    targets: Tensor,
    function: GradientFilter,
    times: Tensor,
    *,
    noise: float,
    tolerance: float,
) -> Tensor:
    """Coefficients c_t `[T, N, C]` of the kernel functions at finite ``times`` `[T]`.

    Args:
        product: A c `[N, C]` for c `[N, C]`.
        start: f_0(X) `[N, C]`, logits.
        targets: Y `[N, C]`, probabilities of the classes.
        function: Learning rate and momentum, and whether steps are discrete.
        times: Times in units of the learning rate, or numbers of steps.
        noise: s, the weight of the penalty on the weights' move.
        tolerance: Error of the integration, relative and absolute; 1e-10 at the finest.

    Raises:
        SolveError: The integration failed.
    """

    def descent(c: Tensor) -> Tensor:
        return targets - probabilities(start + product(c)) - noise * c

    if function.discrete:
        return _steps(descent, torch.zeros_like(start), function, times)
    wanted, position = times.unique(return_inverse=True)
    if wanted[-1] == 0:
        return start.new_zeros(times.shape[0], *start.shape)

    def derivative(_time: float, c: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return function.rate * descent(torch.from_numpy(c).to(start).view_as(start)).flatten().cpu().numpy()

    solution: Any = solve_ivp(
        derivative,
        (0.0, wanted[-1].item()),
        np.zeros(start.numel()),
        # Stiff late, when the residuals of large eigenvalues have gone, and not early.
        method="LSODA",
        t_eval=wanted.tolist(),
        rtol=max(tolerance, _FINEST),
        atol=max(tolerance, _FINEST),
    )
    if not solution.success:
        raise SolveError(f"the cross-entropy flow could not be integrated up to t = {wanted[-1]:g}: {solution.message}")
    return torch.from_numpy(solution.y.T.copy()).to(start).unflatten(-1, start.shape)[position]


def _steps(descent: Callable[[Tensor], Tensor], c: Tensor, function: GradientFilter, times: Tensor) -> Tensor:
    """c after each of the numbers of steps."""
    wanted = [round(time) for time in times.tolist()]
    marks = set(wanted)
    velocity, kept = torch.zeros_like(c), {0: c}
    for step in range(1, max(wanted) + 1):
        velocity = function.momentum * velocity + descent(c)
        c = c + function.rate * velocity
        if step in marks:
            kept[step] = c
    return torch.stack([kept[step] for step in wanted])
