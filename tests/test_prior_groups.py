"""Prior variances of named groups of parameters: sums of kernels of each group's own, in every backend and model."""

from __future__ import annotations

from fnmatch import fnmatch

import gpytorch
import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, SelectionError

X = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
BACKENDS = [None, gpntk.StructuredBackend, gpntk.DenseBackend, gpntk.AutodiffBackend, gpntk.BackwardBackend]
# The first splits a layer, the second overlaps: the last group that matches wins.
GROUPS = [
    {"weights": ["*weight", "*gain"], "biases": "*bias"},
    {"body": "*", "head": ["2.*"], "gain": "1.gain"},
    {"head": "2.*", "rest": ["0.*", "1.*"]},
]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.gain) + self.gain.cumsum(0)


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), Gain(), nn.Linear(6, outputs)).double()


def members(groups: dict, name: str) -> str:
    globs = {group: [given] if isinstance(given, str) else given for group, given in groups.items()}
    return [group for group in groups if any(fnmatch(name, glob) for glob in globs[group])][-1]


def exact(module: nn.Module, x: Tensor, variance: dict[str, float]) -> Tensor:
    """Σ_p variance_p (df/dw_p)(df/dw_p)ᵀ by plain backward passes."""
    rows = [
        torch.cat(
            [
                variance[name] ** 0.5 * gradient.flatten()
                for (name, _), gradient in zip(
                    module.named_parameters(),
                    torch.autograd.grad(output, list(module.parameters()), retain_graph=True),
                    strict=True,
                )
            ]
        )
        for output in module(x).flatten()
    ]
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__ if b else "default")
@pytest.mark.parametrize("groups", GROUPS, ids=" ".join)
def test_kernels(groups: dict, backend) -> None:
    if backend is gpntk.StructuredBackend:
        module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        groups = {name: globs for name, globs in groups.items() if name != "gain"}
        groups = {name: "0.*" if name == "rest" else globs for name, globs in groups.items()}
    else:
        module = network()
    kernel = gpntk.NTKKernel(module, prior_groups=groups, backend=backend)
    values = torch.arange(1.0, 1 + len(groups), dtype=torch.float64)
    kernel.layer_variances = values[:, None]
    variance = dict(zip(groups, values.tolist(), strict=True))
    wanted = exact(module, X, {name: variance[members(groups, name)] for name, _ in module.named_parameters()})
    found, scale = kernel(X), wanted.abs().max()
    assert (to_dense(found) - wanted).abs().max() < 1e-12 * scale
    assert (kernel(X, diag=True) - wanted.diagonal()).abs().max() < 1e-12 * scale
    v = torch.randn(len(wanted), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (found @ v - wanted @ v).abs().max() < 1e-11 * scale
    assert (to_dense(kernel(X[:3], X)) - wanted[:6]).abs().max() < 1e-12 * scale
    assert all(name in repr(kernel) for name in groups)


def test_gradients_in_the_variances() -> None:
    groups, module = GROUPS[0], network(1)
    model_x, y = X, X.sum(-1).sin()

    def value(variances: Tensor) -> Tensor:
        matrix = sum(
            v * exact(module, model_x, {n: float(members(groups, n) == g) for n, _ in module.named_parameters()})
            for g, v in zip(groups, variances, strict=True)
        )
        noisy = matrix + 0.1 * torch.eye(len(y), dtype=torch.float64)
        return torch.distributions.MultivariateNormal(torch.zeros_like(y), noisy).log_prob(y)

    kernel = gpntk.NTKKernel(module, prior_groups=groups)
    kernel.layer_variances = torch.tensor([[0.3], [2.0]], dtype=torch.float64)
    variances = torch.tensor([0.3, 2.0], dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(value(variances), variances)[0] * variances.detach()  # in their logarithms
    prior = gpytorch.distributions.MultivariateNormal(torch.zeros_like(y), kernel(model_x).add_jitter(0.1))
    prior.log_prob(y).backward()
    assert torch.allclose(kernel.raw_layer_variances.grad.flatten(), wanted, rtol=1e-8)


@pytest.mark.parametrize("groups", [{"body": "0.*", "head": "2.*"}, {"weights": "*weight", "biases": "*bias"}])
@pytest.mark.parametrize("new_head", [False, True])
def test_transfer(groups: dict, new_head: bool, tmp_path) -> None:
    """Groups are learned by the evidence, are named, may be fixed, and come back from a file."""
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    y = (X.sum(-1).sin() + 0.1 * X[:, 0]).numpy()
    options = {"kernel": "ntk", "prior_groups": groups, "new_head": new_head, "hyperparameters": "maximum"}
    model = gpntk.TransferRegressor(module, **options).fit(X.numpy(), y)
    named = [name for name in model.hyperparameters_ if any(group in name for group in groups)]
    # The head's own group has no member below a new head.
    assert len(named) == (1 if new_head and "head" in groups else 2)
    model.save(tmp_path / "model.safetensors")
    again = gpntk.TransferRegressor.load(tmp_path / "model.safetensors", module)
    assert again.hyperparameters_ == model.hyperparameters_
    assert abs(again.predict(X.numpy()) - model.predict(X.numpy())).max() < 1e-10
    if not new_head:
        one = gpntk.TransferRegressor(module, kernel="ntk", hyperparameters="maximum").fit(X.numpy(), y)
        # One variance for all is among those of two groups, but for the priors of the variances.
        assert model.log_marginal_likelihood_ > one.log_marginal_likelihood_ - 0.5


def test_bad_groups() -> None:
    module = network()
    for groups, words in (
        ({"head": "3.*"}, r"prior_groups\['head'\].*matches none"),
        ({"head": "2.*"}, "no group for 0.weight"),
        ({"head": "2.*", "all": "*"}, r"'head'.*left empty"),
        ("layers", "must be a mapping"),
    ):
        with pytest.raises(SelectionError, match=words):
            gpntk.NTKKernel(module, prior_groups=groups)
    with pytest.raises(InputError, match="layer_variances"):
        gpntk.NTKKernel(module, prior_groups={"all": "*"}, layer_variances=True)
