"""Every backend on every network, against Jacobians made by torch.func alone."""

import copy
import functools
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import gpntk
from gpntk.errors import InputError
from gpntk.jacobians import AbstractJacobianBackend, AverageBackend
from gpntk.network.primitives import differentiable_operations
from gpntk.testing import check_backend
from tests.cases import CASES, Case, mlp, reference_jacobian

BACKENDS = [gpntk.jacobians.DenseBackend, gpntk.jacobians.AutodiffBackend, gpntk.jacobians.StructuredBackend]
PAIRS = [(case, backend) for case in CASES for backend in BACKENDS]
IDS = [f"{case.name}-{backend.__name__}" for case, backend in PAIRS]


def relative_error(value: Tensor, reference: Tensor) -> float:
    return ((value - reference).abs().max() / reference.abs().max()).item()


def references(case: Case, module: nn.Module, *xs: Tensor) -> list[Tensor]:
    return [reference_jacobian(module, x.view(-1, *case.input_shape)) for x in xs]


def assert_products(backend: AbstractJacobianBackend, xs: list[Tensor], js: list[Tensor], tolerance: float) -> None:
    x1, x2 = (x.unsqueeze(0) for x in xs)
    j1, j2 = js
    v, u = torch.randn(1, 3, j1.shape[1]).to(x1), torch.randn(1, 3, j1.shape[0]).to(x1)
    assert relative_error(backend.jvp(x1, v)[0], v[0] @ j1.T.to(v)) < tolerance
    assert relative_error(backend.vjp(x1, u)[0], u[0] @ j1.to(u)) < tolerance
    assert relative_error(backend.gram(x1, x2)[0, 0], j1 @ j2.T) < tolerance
    assert relative_error(backend.diagonal(x1)[0, 0], j1.square().sum(-1)) < tolerance
    assert relative_error(backend.jacobian(x1)[0], j1) < tolerance
    per_layer = backend.gram(x1, x2, per_layer=True)[0]
    for block, (columns,) in zip(per_layer, backend.groups, strict=True):
        assert (block - j1[:, columns] @ j2[:, columns].T).abs().max() < tolerance * (j1 @ j2.T).abs().max()


@pytest.mark.parametrize(("case", "make"), PAIRS, ids=IDS)
@pytest.mark.parametrize("budget", [None, 20_000], ids=["one-chunk", "many-chunks"])
def test_products_equal_the_reference_jacobian(case: Case, make: type, budget: int | None) -> None:
    module = case.module()
    backend = make(gpntk.freeze(module, input_shape=case.input_shape), budget)
    xs = [case.x(6), case.x(4)]
    assert_products(backend, xs, references(case, module, *xs), 1e-10)


@pytest.mark.parametrize(("case", "make"), PAIRS, ids=IDS)
def test_products_in_float32(case: Case, make: type) -> None:
    module = case.module()
    xs = [case.x(6).float(), case.x(4).float()]
    module32 = copy.deepcopy(module).float()
    backend = make(gpntk.freeze(module32, input_shape=case.input_shape))
    exact = references(case, module32.double(), *(x.double() for x in xs))
    assert_products(backend, xs, exact, 1e-5)


@pytest.mark.parametrize(("case", "make"), PAIRS, ids=IDS)
def test_laws_on_batches(case: Case, make: type) -> None:
    backend = make(gpntk.freeze(case.module(), input_shape=case.input_shape))
    check_backend(backend, case.x(6).view(2, 3, -1), case.x(4).view(2, 2, -1))


@pytest.mark.parametrize(("case", "make"), PAIRS, ids=IDS)
def test_products_are_differentiable_in_x(case: Case, make: type) -> None:
    module = case.module()
    backend = make(gpntk.freeze(module, input_shape=case.input_shape))
    x = case.x(2).unsqueeze(0)
    u = torch.randn(1, 2, 2 * backend.num_outputs(x), dtype=torch.float64)
    v = torch.randn(1, 2, backend.num_features, dtype=torch.float64)
    for function in (
        lambda x: backend.vjp(x, u),
        lambda x: backend.jvp(x, v),
        lambda x: backend.gram(x, x),
        backend.diagonal,
    ):
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        weights, direction, step = torch.randn_like(value), torch.randn_like(x), 1e-6
        (gradient,) = torch.autograd.grad((value * weights).sum(), leaf)
        difference = (function(x + step * direction) - function(x - step * direction)) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), (difference * weights).sum(), rtol=1e-6, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.integers(1, 7), min_size=0, max_size=3),
    outputs=st.integers(1, 4),
    positions=st.integers(1, 4),
    biases=st.booleans(),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    activation=st.sampled_from([nn.Tanh, nn.SiLU, nn.Softplus, nn.Identity]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    selection=st.sampled_from([None, "*weight", "net.0.*", "readout"]),
)
def test_structured_products_on_random_networks(
    widths, outputs, positions, biases, rows, columns, activation, dtype, selection
) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [3, *widths, outputs]
            layers = [
                layer for i, o in itertools.pairwise(sizes) for layer in (nn.Linear(i, o, bias=biases), activation())
            ]
            self.net = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x).sum(1)

    torch.manual_seed(rows + 10 * columns)
    module = Shared().to(dtype)
    network = gpntk.freeze(module, selection, input_shape=(positions, 3))
    xs = [torch.randn(count, positions * 3).to(dtype) for count in (rows, columns)]
    # In the same precision: how far float32 moves activations that cancel is the network's, not the products'.
    exact = [reference_jacobian(module, x.view(-1, positions, 3), list(network.names)).double() for x in xs]
    assert_products(gpntk.jacobians.StructuredBackend(network), xs, exact, 1e-10 if dtype == torch.float64 else 1e-5)


def test_small_networks_take_the_dense_jacobian() -> None:
    network = gpntk.freeze(nn.Sequential(nn.Linear(1, 30), nn.Tanh(), nn.Linear(30, 1)))
    choice = gpntk.AutoBackend.select(network, torch.randn(1, 200, 1))
    assert isinstance(choice.backend, gpntk.jacobians.DenseBackend)
    assert "J is small, 200 x 91, and products with all of it cost less" in choice.reason
    tight = gpntk.AutoBackend.select(network, torch.randn(1, 200, 1), memory_budget=10_000)
    assert isinstance(tight.backend, gpntk.jacobians.StructuredBackend)


@pytest.mark.parametrize("make", [gpntk.jacobians.AutodiffBackend, gpntk.jacobians.DenseBackend, gpntk.AutoBackend])
def test_more_outputs_than_parameters_take_forward_mode(make: type, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    class Filter(nn.Module):
        """A recurrence of three parameters, every state an output."""

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            states = [x[:, 0]]
            for column in x.unbind(1):
                states.append((self.weights[0] * states[-1] + self.weights[1] * column + self.weights[2]).tanh())
            return torch.stack(states[1:], 1)

    network, x = Filter(), torch.randn(2, 4, 6, dtype=torch.float64)
    backend = make(gpntk.freeze(network))
    monkeypatch.setattr(gpntk.jacobians.AutodiffBackend, "vjp", None)
    expected = torch.stack([reference_jacobian(network, rows) for rows in x])
    torch.testing.assert_close(backend.jacobian(x), expected)
    torch.testing.assert_close(backend.gram(x, x)[:, 0], expected @ expected.mT)
    if make is gpntk.AutoBackend:
        assert backend.choice(x).reason == "an input has more outputs, 6, than there are parameters, 3"


class Cube(torch.autograd.Function):
    """Without a formula for forward mode, or for a second derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize("function", [Cube.apply, lambda x: torch.cdist(x, x.new_ones(1, x.shape[1])) * x])
def test_operations_that_have_no_forward_mode(function) -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return function(self.scale * x)

    network, x = Scale(), torch.randn(1, 4, 6, dtype=torch.float64)
    jacobian = gpntk.AutoBackend(gpntk.freeze(network)).jacobian(x)
    step = 1e-6
    with torch.no_grad():
        high, low = (gpntk.freeze(network).forward(x[0], {"scale": network.scale + sign * step}) for sign in (1, -1))
    torch.testing.assert_close(jacobian[0, :, 0], ((high - low) / (2 * step)).flatten(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5, 2.0, float("inf")])
def test_distances_in_primitives(p: float) -> None:
    one, two = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    one[0, 0] = two[0]
    exact = torch.cdist(one, two, p, compute_mode="donot_use_mm_for_euclid_dist")
    with differentiable_operations():
        torch.testing.assert_close(torch.cdist(one, two, p), exact)


def test_average_is_the_mean_of_the_outputs_kernels() -> None:
    case = next(case for case in CASES if case.name == "mlp-c3")
    module, x1, x2 = case.module(), case.x(4), case.x(3)
    network = gpntk.freeze(module)
    backend = AverageBackend(network, gpntk.jacobians.StructuredBackend)
    check_backend(backend, x1.unsqueeze(0), x2.unsqueeze(0))
    j1, j2 = (j.unflatten(0, (-1, 3)) for j in references(case, module, x1, x2))
    torch.testing.assert_close(backend.gram(x1[None], x2[None])[0, 0], torch.einsum("ncp,mcp->nm", j1, j2) / 3)
    assert backend.num_features == 3 * network.num_params


@pytest.mark.parametrize("make", BACKENDS)
def test_cached_factors_follow_in_place_changes_of_x(make: type) -> None:
    backend = make(gpntk.freeze(CASES[0].module()))
    x = CASES[0].x(4).unsqueeze(0)
    before = backend.gram(x, x)
    x.mul_(2.0)
    fresh = make(gpntk.freeze(CASES[0].module())).gram(x.clone(), x.clone())
    torch.testing.assert_close(backend.gram(x, x), fresh, rtol=1e-12, atol=0)
    assert not torch.allclose(before, fresh)


def test_cache_is_not_fooled_by_reused_memory() -> None:
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(CASES[0].module()))
    diagonals = [backend.diagonal(torch.full((1, 3, 5), float(value), dtype=torch.float64)) for value in range(20)]
    fresh = [
        gpntk.jacobians.StructuredBackend(gpntk.freeze(CASES[0].module())).diagonal(
            torch.full((1, 3, 5), float(value), dtype=torch.float64)
        )
        for value in range(20)
    ]
    torch.testing.assert_close(torch.stack(diagonals), torch.stack(fresh))


def test_cache_stays_within_its_budget() -> None:
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(CASES[0].module()), memory_budget=20_000)
    for rows in range(1, 12):
        backend.diagonal(CASES[0].x(rows).unsqueeze(0))
    assert sum(size for *_, size in backend.cache._entries.values()) <= 20_000
    roomy = gpntk.jacobians.StructuredBackend(gpntk.freeze(CASES[0].module()), memory_budget=10**9)
    for rows in range(1, 30):
        roomy.diagonal(CASES[0].x(rows).unsqueeze(0))
    assert len(roomy.cache._entries) <= 16


@pytest.mark.parametrize("make", [*BACKENDS, gpntk.AutoBackend, functools.partial(AverageBackend, factory=BACKENDS[2])])
def test_backends_pickle_and_copy(make) -> None:
    backend = make(gpntk.freeze(CASES[1].module()))
    x = CASES[1].x(4).unsqueeze(0)
    gram = backend.gram(x, x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(backend)).gram(x, x), gram)
    torch.testing.assert_close(copy.deepcopy(backend).gram(x, x), gram)


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_without_grad_mode(make: type, mode) -> None:
    case = CASES[1]
    module, x = case.module(), case.x(4)
    backend = make(gpntk.freeze(module))
    with mode():
        inside = x.clone().unsqueeze(0)
        gram = backend.gram(inside, inside)[0, 0]
    (j,) = references(case, module, x)
    assert relative_error(gram.clone(), j @ j.T) < 1e-10


@pytest.mark.parametrize("make", BACKENDS)
def test_results_live_where_x_lives(make: type) -> None:
    # No default-device tensor may sneak in: build every fresh tensor of torch's factories on meta and see none used.
    backend = make(gpntk.freeze(CASES[1].module()))
    x = CASES[1].x(3).unsqueeze(0)
    with torch.device("meta"):
        gram, diagonal = backend.gram(x, x), backend.diagonal(x)
        image = backend.vjp(x, torch.ones(1, 2, 9, dtype=torch.float64, device="cpu"))
    assert {gram.device.type, diagonal.device.type, image.device.type} == {"cpu"}


@pytest.mark.parametrize("name", ["mlp-c3", "tokens-c3", "cnn-batchnorm", "attention"])
@pytest.mark.parametrize(("precision", "tolerance"), [("tf32", 1e-3), ("bfloat16", 2e-2)])
def test_reduced_precision_keeps_to_its_stated_error(name: str, precision, tolerance: float) -> None:
    case = next(case for case in CASES if case.name == name)
    module = case.module().float()
    xs = [case.x(6).float(), case.x(4).float()]
    exact = references(case, copy.deepcopy(module).double(), *(x.double() for x in xs))
    before = torch.get_float32_matmul_precision()
    network = gpntk.freeze(module, input_shape=case.input_shape)
    backend = gpntk.jacobians.StructuredBackend(network, precision=precision)
    x1, x2 = (x.unsqueeze(0) for x in xs)
    gram = backend.gram(x1, x2)
    assert gram.dtype == torch.float32
    assert relative_error(gram[0, 0], exact[0] @ exact[1].T) < tolerance
    v, u = torch.randn(1, 3, exact[0].shape[1]), torch.randn(1, 3, exact[0].shape[0])
    assert relative_error(backend.jvp(x1, v)[0], v[0].double() @ exact[0].T) < tolerance
    assert relative_error(backend.vjp(x1, u)[0], u[0].double() @ exact[0]) < tolerance
    assert relative_error(backend.diagonal(x1)[0, 0], exact[0].square().sum(-1)) < tolerance
    assert torch.get_float32_matmul_precision() == before
    kept = backend._blocks(x1)[0]  # pyright: ignore[reportIndexIssue]
    half = {t.dtype for part in kept.values() for t in part.factors if t is not None}
    assert half == {torch.bfloat16 if precision == "bfloat16" else torch.float32}


def test_an_unknown_precision() -> None:
    with pytest.raises(InputError, match="precision='half': choose one of 'exact', 'tf32', 'bfloat16'"):
        gpntk.jacobians.StructuredBackend(gpntk.freeze(nn.Linear(2, 1)), precision="half")  # pyright: ignore[reportArgumentType]


def test_float32_sums_over_many_parameters() -> None:
    """A plain matrix product of few rows and 10⁷ columns adds one term after another and is off by 1e-3."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 1))
    x, budget = torch.randn(1, 3, 4), 2**30
    v = torch.randn(1, 1, gpntk.freeze(module).num_params)
    explicit = gpntk.jacobians.DenseBackend(gpntk.freeze(module), memory_budget=budget)
    gram, image = explicit.gram(x, x), explicit.jvp(x, v)
    exact = gpntk.jacobians.StructuredBackend(gpntk.freeze(module.double()), memory_budget=budget)
    expected = exact.gram(x.double(), x.double())
    assert (gram - expected).norm() < 3e-6 * expected.norm()
    expected = exact.jvp(x.double(), v.double())
    assert (image - expected).norm() < 2e-5 * expected.norm()


class Lookup(nn.Module):
    """Token ids in, so that nothing depends on x smoothly."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(x.abs().long() % 5)).sum(1))


@pytest.mark.parametrize("make", [*BACKENDS, gpntk.AutoBackend])
@pytest.mark.parametrize(("module", "parameters"), [(mlp(3), "5.bias"), (mlp(3), "5.*"), (Lookup(), None)])
def test_gradients_are_zero_where_the_jacobian_does_not_depend_on_x(make, module: nn.Module, parameters) -> None:
    backend = make(gpntk.freeze(module.double().eval(), parameters))
    x = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    u = torch.randn(1, 2, 4 * backend.num_outputs(x), dtype=torch.float64)
    v = torch.randn(1, 2, backend.num_features, dtype=torch.float64)
    zero = parameters != "5.*"
    for value in (backend.vjp(x, u), backend.jvp(x, v), backend.gram(x, x), backend.diagonal(x), backend.jacobian(x)):
        (gradient,) = torch.autograd.grad((value * torch.randn_like(value)).sum(), x)
        assert bool((gradient == 0).all()) == zero


@pytest.mark.parametrize("make", [*BACKENDS, gpntk.AutoBackend])
def test_a_jacobian_that_is_zero(make) -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(module[0].bias, -1e3)
    backend = make(gpntk.freeze(module, ["0.*", "2.weight"]))
    x = torch.randn(1, 5, 3, dtype=torch.float64)
    assert backend.gram(x, x).abs().max() == 0
    assert backend.vjp(x, torch.ones(1, 1, 10, dtype=torch.float64)).abs().max() == 0
    if make is gpntk.AutoBackend:
        assert "structured rule" in backend.by_rules(x).reason


def test_a_network_that_only_torch_func_cannot_run_goes_by_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its many outputs would go by passes of their own; what is no fault of torch.func is raised."""

    class Written(torch.autograd.Function):
        """In the old style, which torch.func refuses."""

        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        def backward(ctx, gradient: Tensor) -> Tensor:
            return gradient * ctx.saved_tensors[0].cos()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 30)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Written.apply(self.first(x)))

    module = Wrapped().double()
    monkeypatch.setattr(gpntk.cost.Machine, "of", lambda _device: gpntk.cost.Machine(calls=1e12))
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    x, u = torch.randn(1, 4, 3, dtype=torch.float64), torch.randn(1, 1, 120, dtype=torch.float64)
    torch.testing.assert_close(backend.vjp(x, u)[0], u[0] @ reference_jacobian(module, x[0]))
    assert "Written.apply" in backend._autodiff.refusal(x)

    plain = gpntk.jacobians.StructuredBackend(gpntk.freeze(many_outputs()))
    plain.check(x)
    assert plain._by_passes(x, 1)
    assert not plain._autodiff.refusal(x)

    def fail(*_args: object) -> Tensor:
        raise RuntimeError("a real bug")

    monkeypatch.setattr(plain._autodiff, "vjp", fail)
    with pytest.raises(RuntimeError, match="a real bug"):
        plain.vjp(x, torch.ones(1, 1, 800, dtype=torch.float64))


def many_outputs() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 200)).double()
