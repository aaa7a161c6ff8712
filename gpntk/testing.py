"""Laws that every layer rule, Jacobian backend and feature kernel obeys, for testing your own.

Each function raises ``AssertionError`` with the law that broke and by how much. Run them on float64 inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from gpntk.jacobians import AbstractJacobianBackend
from gpntk.jacobians.rules import AbstractLayerRule, Factors, bind
from gpntk.kernels import AbstractFeatureKernel

__all__ = ["check_backend", "check_kernel", "check_rule"]


def check_rule(function: Callable[..., Tensor], *arguments: Any, tolerance: float = 1e-10) -> None:
    """Check the rule for one call ``function(*arguments)``, whose inputs have their rows first, against plain autograd.

    Gradients, both products, Gram, diagonal, uses joined, and each parameter alone. (Rules whose parameters broadcast
    over rows are checked by a network: `check_backend`.)

    Example:
        >>> import torch
        >>> x, weight = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
        >>> check_rule(torch.nn.functional.linear, x, weight)
    """
    binding = bind(function, arguments, {})
    if binding is None or binding.copied:
        raise AssertionError("binding: no rule takes this call, or one whose parameters broadcast over rows")
    generator = torch.Generator("cpu").manual_seed(0)
    parameters = {own: operand.detach().clone().requires_grad_() for own, operand in binding.operands.items()}
    own_of = {id(operand): own for own, operand in binding.operands.items()}
    with torch.enable_grad():
        output = function(*(parameters[own_of[id(a)]] if id(a) in own_of else a for a in arguments))
    g = torch.randn(len(output), 2, *output.shape[1:], generator=generator, dtype=output.dtype, device="cpu")
    g = g.to(output.device)
    expected = {own: _gradients(output, g, parameter) for own, parameter in parameters.items()}
    # One copy of every row, and a batch of one.
    laid_out = binding.rule.factors(tuple(tensor.unsqueeze(1) for tensor in binding.inputs), g.unsqueeze(2))
    factors = Factors(*(None if tensor is None else tensor.unsqueeze(0) for tensor in laid_out))
    subsets = [(own,) for own in expected] if len(expected) > 1 else []
    for subset in [tuple(expected), *subsets]:
        rule = replace(binding.rule, own=subset)
        _check_products(rule, factors, {own: expected[own] for own in subset}, tolerance)


def _gradients(output: Tensor, g: Tensor, parameter: Tensor) -> Tensor:
    """d<g_nc, s_n>/dp `[N, C, P]`, one by one."""
    rows = [
        torch.autograd.grad((cotangent * s).sum(), parameter, retain_graph=True)[0].flatten()
        for s, cotangents in zip(output, g, strict=True)
        for cotangent in cotangents
    ]
    return torch.stack(rows).unflatten(0, g.shape[:2])


def _check_products(rule: AbstractLayerRule, factors: Factors, expected: dict[str, Tensor], tolerance: float) -> None:
    gradients, shapes = rule.gradients(factors), {own: g.shape[3:] for own, g in rule.gradients(factors).items()}
    if gradients.keys() != expected.keys():
        raise AssertionError(f"own: products give {sorted(gradients)}, not {sorted(expected)}")
    for own, exact in expected.items():
        _close(f"gradients of {own!r}", gradients[own][0].flatten(2), exact, tolerance)
    rows, outputs = next(iter(expected.values())).shape[:2]
    generator = torch.Generator("cpu").manual_seed(1)
    example = next(iter(expected.values()))
    u = torch.randn(1, 3, rows, outputs, generator=generator, device="cpu").to(example)
    for own, image in rule.vjp(factors, u).items():
        _close(f"vjp of {own!r}", image[0].flatten(1), torch.einsum("knc,ncp->kp", u[0], expected[own]), tolerance)
    tangents = {
        own: torch.randn(1, 3, *shape, generator=generator, device="cpu").to(example) for own, shape in shapes.items()
    }
    terms = [torch.einsum("kp,ncp->knc", tangents[own][0].flatten(1), exact) for own, exact in expected.items()]
    _close("jvp", rule.jvp(factors, tangents)[0], torch.stack(terms).sum(0), tolerance)
    gram = torch.stack([torch.einsum("ncp,mdp->ncmd", exact, exact) for exact in expected.values()]).sum(0)
    few = factors.rows(slice(0, 1))
    _close("Gram", rule.gram(factors, factors)[0], gram, tolerance)
    _close("Gram of different rows", rule.gram(few, factors)[0], gram[:1], tolerance)
    diagonal = torch.stack([exact.square().sum(-1) for exact in expected.values()]).sum(0)
    _close("diagonal", rule.diagonal(factors)[0], diagonal, tolerance)
    joined = rule.join([factors, factors])
    _close("two uses joined", rule.gram(joined, joined)[0], 4 * gram, tolerance)


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
