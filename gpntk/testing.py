"""Laws that every Jacobian backend and feature kernel obeys, for testing your own.

Each function raises ``AssertionError`` with the law that broke and by how much. Run them on float64 inputs.
"""

from __future__ import annotations

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpntk.jacobians import AbstractJacobianBackend
from gpntk.kernels import AbstractFeatureKernel

__all__ = ["check_backend", "check_kernel"]


def check_backend(backend: AbstractJacobianBackend, x1: Tensor, x2: Tensor, tolerance: float = 1e-10) -> None:
    """Check the laws of a backend on x1 `[B, N, D]` and x2 `[B, M, D]`: adjoint, Gram, symmetry, diagonal, groups.

    Example:
        >>> import torch, gpntk
        >>> network = gpntk.freeze(torch.nn.Linear(3, 2).double())
        >>> check_backend(gpntk.jacobians.AutodiffBackend(network), *torch.randn(2, 1, 4, 3, dtype=torch.float64))
    """
    outputs = backend.num_outputs(x1)
    generator = torch.Generator("cpu").manual_seed(0)
    u = torch.randn(x1.shape[0], 3, x1.shape[1] * outputs, generator=generator, device="cpu").to(x1)
    w = torch.randn(x2.shape[0], 3, x2.shape[1] * outputs, generator=generator, device="cpu").to(x2)
    v = torch.randn(x1.shape[0], 3, backend.num_features, generator=generator, device="cpu").to(x1)

    _close(
        "adjoint: <u, J v> = <Jᵀ u, v>", (u * backend.jvp(x1, v)).sum(-1), (backend.vjp(x1, u) * v).sum(-1), tolerance
    )
    gram = backend.gram(x1, x2)
    _close("Gram: J1 (J2ᵀ w) = K w", backend.jvp(x1, backend.vjp(x2, w)), w @ gram[:, 0].mT, tolerance)
    _close("transpose: K(x1, x2) = K(x2, x1)ᵀ", gram, backend.gram(x2, x1).mT, tolerance)
    square = backend.gram(x1, x1)
    _close("diagonal: diag K", backend.diagonal(x1), square.diagonal(dim1=-2, dim2=-1), tolerance)
    _close("groups: layers sum to the whole", backend.gram(x1, x2, per_layer=True).sum(1), gram[:, 0], tolerance)
    _close("explicit: J Jᵀ = K", backend.jacobian(x1) @ backend.jacobian(x1).mT, square[:, 0], tolerance)


def check_kernel(kernel: AbstractFeatureKernel, x: Tensor, tolerance: float = 1e-10) -> None:
    """Check the laws of a kernel on x `[N, D]`: positive semi-definite, feature map, diagonal, rows.

    Example:
        >>> import torch, gpntk
        >>> check_kernel(gpntk.NTKKernel(torch.nn.Linear(3, 2).double()), torch.randn(4, 3, dtype=torch.float64))
    """
    lazy, diagonal = kernel(x), kernel(x, diag=True)
    assert isinstance(lazy, LinearOperator)
    assert isinstance(diagonal, Tensor)
    operator = lazy.evaluate_kernel()
    dense = operator.to_dense()
    smallest = torch.linalg.eigvalsh(dense).min()
    if smallest < -tolerance * dense.abs().max():
        raise AssertionError(f"positive semi-definite: the smallest eigenvalue is {smallest:.3e}")
    _close("diagonal: k(x, diag=True)", diagonal, dense.diagonal(), tolerance)
    identity = torch.eye(dense.shape[-1], dtype=x.dtype, device=x.device)
    _close("product: K I = K", operator._matmul(identity), dense, tolerance)
    _close("rows: K[i] is row i", operator[:1].to_dense(), dense[:1], tolerance)
    if "raw_layer_variances" not in dict(kernel.named_parameters()):
        features = kernel.features(x).to_dense()
        _close("feature map: K = Φ Φᵀ", features @ features.mT, dense, tolerance)


def _close(law: str, one: Tensor, two: Tensor, tolerance: float) -> None:
    scale = two.abs().max().clamp_min(torch.finfo(two.dtype).tiny)
    error = ((one - two).abs().max() / scale).item()
    if not error <= tolerance:
        raise AssertionError(f"{law}: relative error {error:.3e} exceeds {tolerance:.1e}")
