"""Whatever autograd can differentiate has a kernel: networks against their own backward passes, row by row."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from linear_operator import to_dense
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gpntk
from gpntk.errors import NetworkError
from gpntk.jacobians import AbstractJacobianBackend
from gpntk.testing import check_backend

pytestmark = pytest.mark.filterwarnings(
    "ignore:Full backward hook is firing", "ignore:None of the inputs have requires_grad"
)

X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[0.0, 3], [1, 2], [4, 4], [6, 5], [2, 0]], dtype=torch.float64)
NODES = torch.arange(4.0, dtype=torch.float64)[:, None]


def exact_jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """J `[N*C, P]`: the user's own module, a row and an output at a time."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    rows = []
    for row in x:
        with torch.enable_grad():
            outputs = module(row[None].clone().requires_grad_()).reshape(-1)
        for output in outputs:
            for parameter in parameters:
                parameter.grad = None
            output.backward(retain_graph=True)
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
            rows.append(torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in gradients]))
    for parameter in parameters:
        parameter.grad = None
    return torch.stack(rows).detach()


# --- the networks ----------------------------------------------------------------------------------------------


class OldSign(torch.autograd.Function):
    """The context in forward, which torch.func does not take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return g[0]


class OldCube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g[0]


class NewCube(torch.autograd.Function):
    """The context set up apart, without a rule for vmap."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g[0]


class VmapCube(NewCube):
    generate_vmap_rule = True


class OnceCube(OldCube):
    backward = staticmethod(torch.autograd.function.once_differentiable(OldCube.backward))


class NumpyCube(torch.autograd.Function):
    """A backward pass that torch cannot see into."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().numpy()
        return torch.from_numpy(ctx.x**3)

    @staticmethod
    def backward(ctx: Any, *g: Any) -> Any:
        return torch.from_numpy(3 * ctx.x**2 * g[0].detach().numpy())


@torch.library.custom_op("gpntk_tests::cube", mutates_args=())
def library_cube(x: Tensor) -> Tensor:
    return x**3


library_cube.register_autograd(
    lambda ctx, g: 3 * ctx.saved_tensors[0] ** 2 * g,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.jit.script
def scripted_triple(x: Tensor) -> Tensor:
    return x + x + x


def scripted_wave() -> Callable[[Tensor], Tensor]:
    """A new one, which TorchScript has not optimised yet."""

    def wave(x: Tensor) -> Tensor:
        return torch.sin(2.0 * x) * x

    return torch.jit.script(wave)


class Net(nn.Module):
    """Two layers, with anything between."""

    def __init__(self, between: Callable[..., Any] = torch.tanh, outputs: int = 2) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, outputs)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))


class Body(Net):
    """A net whose first layer runs by ``how``."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(lambda z: torch.tanh(self.a(z)), x))


class Forces(nn.Module):
    def __init__(self, detach: bool = True, switch: bool = True) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        self.detach, self.switch = detach, switch

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(True if self.switch else torch.is_grad_enabled()):
            x = x.detach().requires_grad_() if self.detach else x.requires_grad_()
            return -torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


class EnergyAndForces(Forces):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            energy = self.energy(x)
            return torch.cat([energy, -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]], -1)


class Residual(Forces):
    """u'' + u, as a physics-informed network has it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            u = self.energy(x)
            first = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
            second = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0]
            return second[:, :1] + u


class FuncGrad(Forces):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda z: self.energy(z)[0]))(x)


class FuncJvp(Forces):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.energy, (x,), (torch.ones_like(x),))[1]


class FuncJacrev(Forces):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(self.energy))(x).squeeze(1)


class FuncVmap(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda z: self.b(torch.tanh(self.a(z))))(x)


class Sequence(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], lengths: tuple[int, ...] | None, layers: int = 1) -> None:
        super().__init__()
        self.r, self.b = kind(1, 4, num_layers=layers, batch_first=True), nn.Linear(4, 2)
        self.lengths = lengths

    def forward(self, x: Tensor) -> Tensor:
        # The length of a row is told by the row, so that rows stay independent.
        lengths = torch.full((len(x),), 3) if self.lengths is None else 1 + (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        packed = pack_padded_sequence(x[..., None], lengths.cpu(), batch_first=True, enforce_sorted=False)
        state = self.r(packed)[1]
        return self.b((state[0] if isinstance(state, tuple) else state)[-1])


class Frozen(Net):
    def __init__(self, context: Callable[[], Any]) -> None:
        super().__init__()
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        with self.context():
            h = torch.tanh(self.a(x))
        return self.b(h.clone())


class Graph(nn.Module):
    """Features of four nodes, mixed by a sparse adjacency; x holds the numbers of nodes."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)
        adjacency = torch.eye(4).roll(1, 0) + torch.eye(4)
        self.register_buffer("A", adjacency.to_sparse() if layout == "coo" else adjacency.to_sparse_csr())
        self.register_buffer("nodes", torch.linspace(-1, 1, 12).reshape(4, 3))

    def forward(self, i: Tensor) -> Tensor:
        h = torch.sparse.mm(self.A, self.b(torch.tanh(self.a(self.nodes))))  # pyright: ignore
        return h[i[:, 0].long()]


class Mixed(Net):
    """A parameter that is cast to float32 in forward, as Mamba does."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)) * torch.exp(self.log.float()).to(x.dtype))


class Autocast(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.b(torch.tanh(self.a(x))).to(x.dtype)


class Tokens(nn.Module):
    def __init__(self, sparse: bool = False, by_hook: bool = False) -> None:
        super().__init__()
        self.e, self.b = nn.Embedding(7, 4, sparse=sparse), nn.Linear(8, 2)
        if by_hook:
            self.e.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.e(x.long()).flatten(1)))


class CheckpointedTokens(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x.long()).flatten(1)
        return checkpoint(lambda z: self.b(torch.tanh(z)), h, use_reentrant=True)  # pyright: ignore


class ComplexBuffer(Net):
    """A complex weight that stays out of the selection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.exp(1j * torch.linspace(0, 1, 5)))

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x) * self.phase).real)  # pyright: ignore


class Block(nn.Module):
    """Attention and norms, recomputed in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(1, 4), nn.LayerNorm(4)
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 1)
        self.reentrant = reentrant

    def _block(self, h: Tensor) -> Tensor:
        z = self.norm(h)
        return h + self.attention(z, z, z, need_weights=False)[0]

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[..., None])
        return self.head(checkpoint(self._block, h, use_reentrant=self.reentrant).mean(1))  # pyright: ignore


def hooked(kind: str) -> nn.Module:
    net = Net()
    if kind == "module":
        net.a.register_full_backward_hook(lambda module, given, got: None)
    elif kind == "pre":
        net.a.register_full_backward_pre_hook(lambda module, got: None)
    elif kind == "scales":
        net.a.register_full_backward_hook(lambda module, given, got: tuple(None if g is None else 2 * g for g in given))
    elif kind == "forward":
        net.a.register_forward_hook(lambda module, inputs, output: output.requires_grad_(True))
    elif kind == "several":
        multi = torch.autograd.graph.register_multi_grad_hook
        net.a.register_forward_hook(lambda module, inputs, output: multi([output], lambda g: None) and None)  # pyright: ignore
    elif kind == "tensor":
        net.a.register_forward_hook(lambda module, inputs, output: output.register_hook(lambda g: g) and None)
    return net


def in_pieces(reentrant: bool) -> nn.Module:
    class Pieces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=reentrant)  # pyright: ignore

    return Pieces()


def pruned() -> nn.Module:
    net = Net()
    prune.l1_unstructured(net.a, "weight", 0.4)
    return net


def old_weight_norm() -> nn.Module:
    net = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(net.a)
    return net


def old_spectral_norm() -> nn.Module:
    net = Net()
    nn.utils.spectral_norm(net.a)
    net.a(torch.randn(2, 3))
    return net


def keeps_features() -> nn.Module:
    net = Net()
    net.a.register_forward_hook(lambda module, inputs, output: setattr(net, "features", output))
    net(torch.randn(2, 3))
    return net


def keeps_features_in_a_list() -> nn.Module:
    net = Net()
    net.kept = [net.a(torch.randn(2, 3)), {"again": net.a(torch.randn(2, 3))}]  # pyright: ignore
    return net


class ForwardMode(Forces):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            return torch.autograd.forward_ad.unpack_dual(self.energy(dual)).tangent  # pyright: ignore


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.l(x)) * x


class WithGate(Net):
    """A part of it in TorchScript."""

    def __init__(self, scripted: bool) -> None:
        super().__init__()
        self.gate = torch.jit.script(Gate()) if scripted else torch.jit.trace(Gate(), torch.randn(2, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.gate(torch.tanh(self.a(x))))  # pyright: ignore


def weight_hook(factor: float) -> nn.Module:
    net = Net()
    net.a.weight.register_hook(lambda g: factor * g)
    return net


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    x: Tensor = X
    twice: bool = True  # whether K has a derivative in x
    float32: bool = True
    rounding: float = 1e-9  # in float64


CASES = {
    "old function, straight through": Case(lambda: Net(OldSign.apply), twice=False),
    "old function": Case(lambda: Net(OldCube.apply)),
    "new function": Case(lambda: Net(NewCube.apply)),
    "function with a rule for vmap": Case(lambda: Net(VmapCube.apply)),
    "once differentiable": Case(lambda: Net(OnceCube.apply), twice=False),
    "backward in NumPy": Case(lambda: Net(NumpyCube.apply), twice=False),
    "library operator": Case(lambda: Net(library_cube)),
    "scripted function": Case(lambda: Net(scripted_triple)),
    "scripted wave": Case(lambda: Net(scripted_wave())),
    "scripted part": Case(lambda: WithGate(True)),
    "traced part": Case(lambda: WithGate(False)),
    "scripted as a whole": Case(lambda: torch.jit.script(Gate()), x=X[:, [0, 1, 2, 0, 1]]),
    "traced as a whole": Case(lambda: torch.jit.trace(Net(), torch.randn(2, 3))),
    "hook of a weight": Case(lambda: weight_hook(2.0)),
    "hook of a weight, without effect": Case(lambda: weight_hook(1.0)),
    "hook of several tensors": Case(lambda: hooked("several")),
    "full backward hook": Case(lambda: hooked("module")),
    "full backward pre-hook": Case(lambda: hooked("pre")),
    # Differentiated twice, the hook scales twice: torch's meaning, not that of finite differences.
    "hook that scales": Case(lambda: hooked("scales"), twice=False),
    "forward hook that asks for gradients": Case(lambda: hooked("forward")),
    "tensor hook": Case(lambda: hooked("tensor")),
    "forces": Case(Forces, twice=False),
    "forces, not detached": Case(lambda: Forces(detach=False), x=X),
    "forces, gradients not switched on": Case(lambda: Forces(detach=False, switch=False)),
    "energy and forces": Case(EnergyAndForces),
    "residual of a differential equation": Case(Residual),
    "forward mode": Case(ForwardMode),
    "func.grad": Case(FuncGrad),
    "func.jvp": Case(FuncJvp),
    "func.jacrev": Case(FuncJacrev),
    "func.vmap": Case(FuncVmap),
    "checkpoint": Case(lambda: Body(lambda f, x: checkpoint(f, x, use_reentrant=False))),
    "checkpoint, reentrant": Case(lambda: Body(lambda f, x: checkpoint(f, x, use_reentrant=True)), twice=False),
    "checkpoint_sequential": Case(lambda: in_pieces(False)),
    "checkpoint_sequential, reentrant": Case(lambda: in_pieces(True), twice=False),
    "checkpointed attention": Case(lambda: Block(False)),
    "checkpointed attention, reentrant": Case(lambda: Block(True), twice=False),
    "checkpointed tokens, reentrant": Case(CheckpointedTokens, x=IDS, twice=False),
    "packed GRU": Case(lambda: Sequence(nn.GRU, None)),
    "packed LSTM, two layers": Case(lambda: Sequence(nn.LSTM, None, layers=2)),
    "packed GRU, unequal lengths": Case(lambda: Sequence(nn.GRU, ())),
    "packed RNN, unequal lengths": Case(lambda: Sequence(nn.RNN, ())),
    "backbone under inference_mode": Case(lambda: Frozen(torch.inference_mode), twice=False),
    "backbone under no_grad": Case(lambda: Frozen(torch.no_grad), twice=False),
    "sparse COO": Case(lambda: Graph("coo"), x=NODES, twice=False),
    "sparse CSR": Case(lambda: Graph("csr"), x=NODES, twice=False),
    "cast in forward": Case(Mixed, twice=False, rounding=1e-6),
    "autocast": Case(Autocast, float32=False),
    "tokens, sparse gradients": Case(lambda: Tokens(sparse=True), x=IDS, twice=False),
    "tokens, enable_input_require_grads": Case(lambda: Tokens(by_hook=True), x=IDS, twice=False),
    "complex buffer": Case(ComplexBuffer),
    "pruned": Case(pruned),
    "old weight_norm": Case(old_weight_norm),
    "old spectral_norm": Case(old_spectral_norm),
    "features kept as an attribute": Case(keeps_features),
    "features kept in a list": Case(keeps_features_in_a_list),
}
RUN_BY = {
    gpntk.StructuredBackend: {
        *("old function", "new function", "once differentiable", "backward in NumPy", "library operator"),
        *("scripted function", "full backward hook", "tensor hook", "cast in forward", "complex buffer", "pruned"),
        *("old weight_norm", "old spectral_norm", "features kept as an attribute", "tokens, sparse gradients"),
    },
    gpntk.AutodiffBackend: {
        *("new function", "func.grad", "func.vmap", "sparse COO", "cast in forward", "complex buffer", "pruned"),
        *("old weight_norm", "old spectral_norm", "features kept as an attribute", "tokens, sparse gradients"),
    },
}
BACKENDS = [
    None,
    gpntk.BackwardBackend,
    gpntk.DenseBackend,
    gpntk.AutodiffBackend,
    gpntk.StructuredBackend,
]


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CASES[name].make().to(dtype).eval(), CASES[name].x.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__ if b else "default")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["64", "32"])
def test_kernels(
    name: str, backend: type[AbstractJacobianBackend] | None, dtype: torch.dtype, tolerance: float
) -> None:
    """K, cross, diagonal, K V and J; a backend that was asked for may refuse by a sentence, never be wrong."""
    if dtype == torch.float32 and not CASES[name].float32:
        pytest.skip("runs in float64 only")
    tolerance = max(tolerance, CASES[name].rounding)
    module, x = made(name, dtype)
    exact = exact_jacobian(module, x)
    gram, scale = exact @ exact.mT, (exact @ exact.mT).abs().max()
    kernel = gpntk.NTKKernel(module, backend=backend)
    v = torch.randn(len(gram), 2, dtype=dtype, generator=torch.Generator().manual_seed(1))
    try:
        found = to_dense(kernel(x))
    except NetworkError:
        # A backend that was asked for may refuse, but not the networks that it can run.
        if backend not in RUN_BY or name in RUN_BY[backend]:
            raise
        return
    assert (found - gram).abs().max() <= tolerance * scale
    c = len(gram) // len(x)
    assert (to_dense(kernel(x[:2], x)) - gram[: 2 * c]).abs().max() <= tolerance * scale
    assert (kernel(x, diag=True) - gram.diagonal()).abs().max() <= tolerance * scale
    assert (kernel(x) @ v - gram @ v).abs().max() <= tolerance * scale * v.abs().sum()
    j = kernel.features(x).to_dense()
    assert (j - exact).abs().max() <= tolerance * exact.abs().max()
    with torch.inference_mode():
        assert (to_dense(kernel(x)) - gram).abs().max() <= tolerance * scale


@pytest.mark.parametrize("name", CASES)
def test_laws(name: str) -> None:
    module, x = made(name)
    backend = gpntk.BackwardBackend(gpntk.freeze(module), memory_budget=2**16)
    check_backend(backend, x[None, :3], x[None, 1:], tolerance=CASES[name].rounding)
    check_backend(backend, torch.stack([x[:2], x[1:3]]), torch.stack([x[2:4], x[:2]]), tolerance=CASES[name].rounding)


@pytest.mark.parametrize("backend", [None, gpntk.BackwardBackend], ids=["default", "backward"])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.twice])
def test_derivative_in_x(name: str, backend: type[AbstractJacobianBackend] | None) -> None:
    """Against finite differences of the exact kernel."""
    module, x = made(name)
    check_slope(gpntk.NTKKernel(module, backend=backend), module, x[:2])


def check_slope(kernel: gpntk.NTKKernel, module: nn.Module, x: Tensor) -> None:
    weights = torch.arange(1.0, 1 + (len(exact_jacobian(module, x))) ** 2, dtype=torch.float64).cos()

    def value(z: Tensor) -> Tensor:
        jacobian = exact_jacobian(module, z)
        return (jacobian @ jacobian.mT).flatten() @ weights

    step, slope = 1e-6, torch.zeros_like(x)
    for i in range(x.numel()):
        shift = torch.zeros_like(x)
        shift.view(-1)[i] = step
        slope.view(-1)[i] = (value(x + shift) - value(x - shift)) / (2 * step)
    z = x.clone().requires_grad_()
    found = torch.autograd.grad(to_dense(kernel(z)).flatten() @ weights, z)[0]
    assert (found - slope).abs().max() <= 1e-6 * slope.abs().max()


@pytest.mark.parametrize("backend", [None, gpntk.BackwardBackend, gpntk.DenseBackend])
@pytest.mark.parametrize("runs", [0, 1, 9])
def test_scripted_functions_whenever_they_are_optimised(
    runs: int, backend: type[AbstractJacobianBackend] | None
) -> None:
    """TorchScript optimises after some runs, and torch.func is wrong from then on; compared with plain Python."""
    module, plain = Net(scripted_wave()).double(), Net(lambda x: torch.sin(2.0 * x) * x).double()
    plain.load_state_dict(module.state_dict())
    exact = exact_jacobian(plain, X)
    v = torch.randn(10, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(times: int) -> None:
        for _ in range(times):
            module(X).square().sum().backward()

    def check(kernel: gpntk.NTKKernel) -> None:
        assert (to_dense(kernel(X.clone())) - exact @ exact.mT).abs().max() <= 1e-12 * exact.square().sum()
        assert (kernel(X.clone()) @ v - exact @ (exact.mT @ v)).abs().max() <= 1e-12 * exact.square().sum()
        check_slope(kernel, plain, X[:2])

    run(runs)
    kernel = gpntk.NTKKernel(module, backend=backend)
    check(kernel)
    run(9)
    check(kernel)
    check(gpntk.NTKKernel(module, backend=backend))
    with pytest.raises(NetworkError, match=r"torch.func gives wrong derivatives of TorchScript.* wave: use Backward"):
        gpntk.AutodiffBackend(gpntk.freeze(module)).jacobian(X[None])


@pytest.mark.parametrize("name", ["once differentiable", "backward in NumPy", "checkpoint, reentrant"])
def test_no_second_derivative(name: str) -> None:
    module, x = made(name)
    for backend in (None, gpntk.BackwardBackend):
        kernel = gpntk.NTKKernel(module, backend=backend)
        with pytest.raises(NetworkError, match="no derivative in x"):
            to_dense(kernel(x.clone().requires_grad_()))


def test_a_tensor_computed_once_from_weights_is_named() -> None:
    """Its derivative would be missed: in the user's own module it is there in the first backward pass."""

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 2)
            self.doubled = self.a.weight * 2

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.doubled.T

    with pytest.raises(NetworkError, match=r"attribute 'doubled'.*network.doubled.detach\(\)"):
        gpntk.NTKKernel(Once())(X.float()).to_dense()


def test_what_cannot_be_copied_is_shared() -> None:
    class Guarded(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lock, self.file = threading.Lock(), open(__file__)  # noqa: SIM115

        def forward(self, x: Tensor) -> Tensor:
            with self.lock:
                return super().forward(x)

    module = Guarded().double()
    exact = exact_jacobian(module, X)
    assert (to_dense(gpntk.NTKKernel(module)(X)) - exact @ exact.T).abs().max() < 1e-12
    module.file.close()


def test_complex_weights_outside_of_the_selection() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
            self.phase = nn.Parameter(torch.exp(1j * torch.linspace(0, 1, 4)))

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) * self.phase).real)

    module = Complex()
    with pytest.raises(NetworkError, match=r"'phase' has dtype torch.complex64.*is_complex"):
        gpntk.NTKKernel(module)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):  # the phases are those of float32
        kernel = gpntk.NTKKernel(module, parameters=["a.*", "b.*"])
        real = nn.ParameterList([p for p in module.parameters() if not p.is_complex()])
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(output, list(real), retain_graph=True)])
            for row in X.float()
            for output in module(row[None])[0]
        ]
        exact = torch.stack(rows) @ torch.stack(rows).T
        assert (to_dense(kernel(X.to(dtype))) - exact).abs().max() < tolerance * exact.abs().max()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("old function", "OldCube.apply"),
        ("checkpoint", "checkpoint"),
        ("forces", "requires_grad_()"),
        ("full backward hook", "BackwardHookFunction.apply"),
        ("scripted function", "scripted_triple"),
        ("scripted part", "Gate"),
    ],
)
def test_the_choice_names_the_operation(name: str, words: str) -> None:
    module, x = made(name)
    backend = gpntk.AutoBackend(gpntk.freeze(module))
    plain, reason = backend._without_rules(backend.network, x[None])
    assert isinstance(plain, gpntk.BackwardBackend)
    assert words in reason
    backend.memory_budget = 1  # nothing that is kept fits
    choice = backend.by_rules(x[None])
    assert words in choice.reason or "rule" in choice.reason


def test_a_network_of_one_dtype() -> None:
    """Asked for another one, it runs in its own, and says so once."""

    class Float32Only(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x)) @ torch.ones(5, 5)
            assert h.dtype == torch.float32
            return self.b(h)

    module = Float32Only()
    exact = exact_jacobian(module, X.float()).double()
    for backend in BACKENDS:
        with pytest.warns(UserWarning, match="does not run in torch.float64"):
            gram = to_dense(gpntk.NTKKernel(module, backend=backend)(X))
        assert gram.dtype == torch.float64
        assert (gram - exact @ exact.T).abs().max() < 2e-4 * gram.abs().max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram = to_dense(gpntk.NTKKernel(module)(X.float()))
    assert (gram.double() - exact @ exact.T).abs().max() < 2e-4 * gram.abs().max()


@pytest.mark.parametrize("kernel", ["ntk", "nngp"])
@pytest.mark.parametrize(
    "name", ["tensor hook", "checkpoint, reentrant", "full backward hook", "pruned", "traced as a whole"]
)
def test_estimators(name: str, kernel: str) -> None:
    """As with the plain network that computes the same; ``nngp`` has no weight below that asks for gradients."""
    module, _ = made(name)
    plain, _ = made("features kept as an attribute")
    if name == "pruned":
        prune.remove(module.a, "weight")
    plain.load_state_dict(module.state_dict())
    x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    y = (module(x.clone()).detach()[:, 0] + 0.3 * x[:, 0].sin()).numpy()
    y = np.stack([y, np.cos(y)], 1)
    options = {"kernel": kernel, "mean": "network", "hyperparameters": "maximum"}
    one, two = (gpntk.TransferRegressor(net, **options).fit(x.numpy(), y) for net in (module, plain))
    found, wanted = one.predict(x.numpy(), return_std=True), two.predict(x.numpy(), return_std=True)
    for a, b in zip(found, wanted, strict=True):
        assert abs(a - b).max() < 1e-6 * abs(b).max()
