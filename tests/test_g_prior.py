"""A prior variance for every parameter: kernels, and the g-prior, against explicit Jacobians in float64."""

from __future__ import annotations

import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError
from gpntk.jacobians import ScaledBackend
from gpntk.kernels import g_prior
from gpntk.likelihoods import Categorical
from gpntk.testing import check_backend

X = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def network(outputs: int = 2) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, outputs)).double()


def jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J `[N*C, P]` by plain backward passes."""
    parameters = list(module.parameters())
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(output, parameters, retain_graph=True)])
            for output in module(x).flatten()
        ]
    )


@pytest.mark.parametrize("backend", [None, gpntk.StructuredBackend, gpntk.AutodiffBackend], ids=str)
@pytest.mark.parametrize("output", ["full", "independent", "sum", 1])
def test_kernels(output, backend) -> None:
    module, x2 = network(), X[:4] + 1
    variance = torch.rand(32 + 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    groups = {"weights": "*weight", "biases": "*bias"}
    own = {"weights": 2.0, "biases": 3.0}
    kernel = gpntk.NTKKernel(module, prior_groups=groups, prior_variance=variance, output=output, backend=backend)
    kernel.layer_variances = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    factors = torch.cat(
        [torch.full((p.numel(),), own["biases" if "bias" in n else "weights"]) for n, p in module.named_parameters()]
    )
    s = variance * factors
    one, two = (jacobian(module, x).unflatten(0, (-1, 2)) for x in (X, x2))

    def reduced(j: Tensor) -> Tensor:
        if output == "full":
            return j.flatten(0, 1)
        if output == "independent":
            return torch.cat([j[:, 0], j[:, 1]], -1) / 2**0.5
        return j.sum(1) / 2**0.5 if output == "sum" else j[:, 1]

    s = torch.cat([s, s]) if output == "independent" else s
    j1, j2 = reduced(one), reduced(two)
    wanted = (j1 * s) @ j2.T
    scale = wanted.abs().max()
    assert (to_dense(kernel(X, x2)) - wanted).abs().max() < 1e-12 * scale
    assert (kernel(X, diag=True) - (j1 * j1 * s).sum(-1)).abs().max() < 1e-12 * scale
    v = torch.randn(len(j1), 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert (kernel(X) @ v - (j1 * s) @ (j1.T @ v)).abs().max() < 1e-11 * scale


def test_laws_of_the_backend() -> None:
    variances = torch.rand(38, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    check_backend(ScaledBackend(gpntk.AutoBackend(gpntk.freeze(network())), variances), X[None, :5], X[None, 3:])


@pytest.mark.parametrize("curved", [False, True])
def test_g_prior(curved: bool) -> None:
    """The inverse diagonal of the Gauss-Newton matrix; a dead parameter has the floor's variance."""
    module = network()
    with torch.no_grad():
        module[2].weight[:, 0] = 0  # no output depends on what enters the first unit
    f = module(X).detach()
    labels = torch.arange(9) % 2
    root = Categorical().root(f, labels) if curved else None
    j = jacobian(module, X)
    p = f.softmax(-1)
    blocks = p.diag_embed() - p[:, :, None] * p[:, None, :] if curved else torch.eye(2).double().expand(9, 2, 2)
    gauss_newton = j.T @ torch.block_diag(*blocks) @ j / len(X)
    d = gauss_newton.diagonal()
    dead = d == 0
    assert dead.sum() == 4  # its three weights and its bias
    wanted = 1 / torch.where(dead, 1e-3 * d.mean(), d.clamp_min(1e-3 * d.mean()))
    for budget in (None, 4 * 38 * 2 * 8 * 8):
        found = g_prior(module, X, root, memory_budget=budget)
        assert ((found - wanted) / wanted).abs().max() < 1e-12
    # The laws of a g-prior: every living parameter moves outputs as much, in whatever units it is.
    assert torch.allclose((found * d)[d > 1e-3 * d.mean()], torch.ones(()).double(), atol=1e-12)
    half = g_prior(module, X, root, floor=0.5, parameters="2.*")
    own = d[-14:]
    assert torch.allclose(half, 1 / own.clamp_min(0.5 * own.mean()), rtol=1e-12)


def test_the_kernel_does_not_know_how_layers_share_a_scale() -> None:
    module, other = (nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 1)).double() for _ in range(2))
    other.load_state_dict(module.state_dict())
    with torch.no_grad():
        for parameter in other[0].parameters():
            parameter.mul_(30)
        other[2].weight /= 30
    one, two = (
        gpntk.NTKKernel(net, prior_variance=g_prior(net, X, floor=1e-12))(X).to_dense() for net in (module, other)
    )
    assert torch.allclose(one, two, rtol=1e-9)
    plain, changed = (to_dense(gpntk.NTKKernel(net)(X)) for net in (module, other))
    assert not torch.allclose(plain, changed, rtol=0.1)


def test_a_network_without_gradients_has_equal_variances() -> None:
    module = network(1)
    nn.init.zeros_(module[2].weight)
    frozen = gpntk.freeze(module, "0.*")
    assert g_prior(frozen, X).equal(torch.ones(24).double())


def test_bad_arguments() -> None:
    module = network()
    for variance, words in (
        (torch.ones(3), "one number for each of the 38"),
        (torch.zeros(38), "finite and positive"),
        ([1.0] * 38, "prior_variance is a list"),
    ):
        with pytest.raises(InputError, match=words):
            gpntk.NTKKernel(module, prior_variance=variance)
    with pytest.raises(InputError, match="floor=0"):
        g_prior(module, X, floor=0)
    with pytest.raises(InputError, match=r"root has shape \(9, 2\)"):
        g_prior(module, X, torch.ones(9, 2))


def transfer(y: Tensor, module: nn.Module, **options) -> tuple[gpntk.transfer.TransferGP, Tensor]:
    """A fit, and its kernel matrix at X."""
    gp = gpntk.transfer.TransferGP(gpntk.freeze(module), X, y, prior="g", hyperparameters="maximum", **options)
    gp.fit()
    prior = gp.fitted.model.form.prior
    logs = torch.zeros(len(prior.hyperparameters), dtype=torch.float64)
    return gp, prior.matrix(logs, X, X)


def in_unit(matrix: Tensor) -> Tensor:
    return matrix / matrix.diagonal().mean()


def of_explicit(j: Tensor, curvature: Tensor) -> Tensor:
    """J S Jᵀ with S the inverse diagonal of JᵀΛJ/N over its floor."""
    d = (j.T @ curvature @ j).diagonal() / len(X)
    return in_unit((j / d.clamp_min(1e-3 * d.mean())) @ j.T)


def test_transfer_of_targets() -> None:
    """In units of each output, of all parameters and of the readout alone."""
    module = network()
    y = torch.stack([X.sum(-1).sin(), 50 * X[:, 0]], -1)
    j = jacobian(module, X)
    for kernel, columns in (("ntk", slice(None)), ("nngp", slice(24, None))):
        gp, found = transfer(y, module, kernel=kernel)
        own = j[:, columns] / gp.task.units.repeat(len(X))[:, None]
        assert torch.allclose(in_unit(found), of_explicit(own, torch.eye(len(own)).double()), atol=1e-10)


def test_transfer_under_a_new_head() -> None:
    module = network(1)
    _, found = transfer(X.sum(-1, keepdim=True).sin(), module, kernel="nngp", mean="zero", new_head=True)
    h = torch.cat([module[:2](X).detach(), torch.ones(9, 1).double()], -1)
    assert torch.allclose(found, of_explicit(h, torch.eye(9).double()), atol=1e-10)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
def test_transfer_of_classes(kernel: str, outputs: int) -> None:
    """With the curvature of the softmax at the network's own logits."""
    module = network(outputs)
    _, found = transfer(torch.arange(9) % 2, module, kernel=kernel, likelihood="categorical")
    p = module(X).detach()
    p = p.softmax(-1) if outputs == 2 else p.sigmoid()
    blocks = p.diag_embed() - p[:, :, None] * p[:, None, :]
    j = jacobian(module, X)[:, slice(None) if kernel == "ntk" else slice(24, None)]
    assert torch.allclose(in_unit(found), of_explicit(j, torch.block_diag(*blocks)), atol=1e-10)


def test_estimators_learn_a_scale_and_come_back_from_a_file(tmp_path) -> None:
    module, labels = network(), (torch.arange(9) % 2).numpy()
    model = gpntk.TransferClassifier(module, prior="g", kernel="ntk", prior_groups={"all": "*"}).fit(X.numpy(), labels)
    model.save(tmp_path / "g.safetensors")
    again = gpntk.TransferClassifier.load(tmp_path / "g.safetensors", module)
    assert again.prior == "g"
    assert abs(again.predict_proba(X.numpy()) - model.predict_proba(X.numpy())).max() < 1e-12
    equal = gpntk.TransferClassifier(module, kernel="ntk", prior_groups={"all": "*"}).fit(X.numpy(), labels)
    assert abs(equal.predict_proba(X.numpy()) - model.predict_proba(X.numpy())).max() > 1e-4
    for options, words in (({"prior": "h"}, "prior='h'"), ({"prior": "g", "kernel": gpntk.NTKKernel(module)}, "own")):
        with pytest.raises(InputError, match=words):
            gpntk.TransferRegressor(module, **options).fit(X.numpy(), X[:, :2].numpy())
