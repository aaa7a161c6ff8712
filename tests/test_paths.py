"""Networks that take another path on other rows: found out, and right all the same."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.errors import NetworkError, UnruledError
from tests.cases import reference_jacobian

TIGHT = functools.partial(gpntk.AutoBackend, memory_budget=60_000)


class Heads(nn.Module):
    """A head per task, each like the others; a batch is of one task."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 64)
        self.heads = nn.ModuleList(nn.Linear(64, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[int(x[0, 0])](torch.tanh(self.trunk(x)))


class Adapted(nn.Module):
    """As many calls for one task as for the other, of which only one uses the adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.adapter, self.head = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.trunk(x))
        return self.head(torch.sin(h) if x[0, 0] == 0 else self.adapter(h))


@pytest.mark.parametrize("make", [Heads, Adapted])
@pytest.mark.parametrize("first", [0, 1])
def test_other_layers_for_other_rows(make, first: int) -> None:
    torch.manual_seed(0)
    module = make().double()
    one, two = torch.randn(30, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    one[:, 0], two[:, 0] = first, 1 - first
    kernel = gpntk.NTKKernel(module, backend=TIGHT)
    assert isinstance(kernel.backend.choice(one[None]).backend, gpntk.jacobians.StructuredBackend)
    kernel(one).to_dense()
    j1, j2 = reference_jacobian(module, one), reference_jacobian(module, two)
    torch.testing.assert_close(kernel(one, two).to_dense(), j1 @ j2.T)
    torch.testing.assert_close(kernel(two).to_dense(), j2 @ j2.T)
    assert "no rules" in kernel.backend._made  # for these rows; those of the path that is known go by rules still
    torch.testing.assert_close(kernel(one).to_dense(), j1 @ j1.T)


class Packed(nn.Module):
    """Rows in the order of their lengths and back, as packing does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        order = (x != 0).sum(1).argsort(descending=True, stable=True)
        return self.head(torch.tanh(self.first(x[order])))[order.argsort()]


def test_rows_reordered_by_their_values() -> None:
    torch.manual_seed(0)
    module, x = Packed().double(), torch.randn(40, 4, dtype=torch.float64)
    kernel = gpntk.NTKKernel(module, backend=TIGHT)
    kernel(x).to_dense()
    x[3, 2:], x[30, 1:] = 0.0, 0.0
    j = reference_jacobian(module, x)
    torch.testing.assert_close(kernel(x).to_dense(), j @ j.T)
    with pytest.raises(NetworkError, match="reorders the rows of x by their values"):
        gpntk.jacobians.StructuredBackend(gpntk.freeze(module)).check(x[None])


class LastToken(nn.Module):
    """Picks a position of each row by its length, and rows of a table by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 3)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.table[(x.abs() * 5).long() % 7])
        return self.head(h)[torch.arange(len(x)), (x > 0).sum(1) % x.shape[1]]


def test_picking_within_a_row_is_no_reordering() -> None:
    torch.manual_seed(0)
    module, x = LastToken().double(), torch.randn(6, 4, dtype=torch.float64)
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    j = reference_jacobian(module, x)
    torch.testing.assert_close(backend.gram(x[None], x[None])[0, 0], j @ j.T)


def test_weights_that_depend_on_the_batch_have_no_rule() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(5, 4)), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            scale = x.abs().max()
            return self.head(torch.tanh(functional.linear(x / scale, self.w * scale)))

    with pytest.raises(UnruledError, match="'w' has no structured rule: it is used by mul"):
        gpntk.jacobians.StructuredBackend(gpntk.freeze(Scaled().double())).check(
            torch.randn(1, 6, 4, dtype=torch.float64)
        )


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        ctx.save_for_backward(x, p)
        return x * p

    @staticmethod
    def backward(ctx, grad):
        x, p = ctx.saved_tensors
        return grad * p, (grad * x).sum(0)


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(3, 2), nn.Parameter(torch.tensor([0.5, 2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + Doubled.apply(torch.tanh(10 * x[:, :2]), self.gain)


@pytest.mark.parametrize("largest", [1.0, 1e4])
def test_what_torch_does_not_show_is_found_by_the_check(largest: float) -> None:
    # Even where one row moves the weights far more than the others do.
    torch.manual_seed(0)
    x = torch.randn(1, 10, 3)
    x[0, 9] = largest
    with pytest.raises(UnruledError, match="'gain' has no structured rule"):
        gpntk.jacobians.StructuredBackend(gpntk.freeze(Hidden())).check(x)


@pytest.mark.parametrize("parameters", ["b.*", "readout"])
def test_no_selected_parameter_has_a_rule(parameters: str) -> None:
    class Form(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 4, 4))

        def forward(self, h: Tensor) -> Tensor:
            return torch.einsum("ni,oij,nj->no", h, self.weight, h)

    class Forms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.l, self.b = nn.Linear(4, 4), Form()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.l(x)))

    torch.manual_seed(0)
    module, x = Forms().double(), torch.randn(5, 4, dtype=torch.float64)
    j = reference_jacobian(module, x, ["b.weight"])
    kernel = gpntk.NTKKernel(module, parameters=parameters)
    torch.testing.assert_close(kernel(x).to_dense(), j @ j.T)


def test_one_convolution_at_two_sizes() -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(2, 2, 2)
    module = nn.Sequential(conv, nn.Tanh(), conv, nn.Flatten(), nn.Linear(8, 2)).double()
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module, input_shape=(2, 6)))
    j, flat = reference_jacobian(module, x), x.flatten(1)[None]
    torch.testing.assert_close(backend.gram(flat, flat)[0, 0], j @ j.T)
    torch.testing.assert_close(backend.diagonal(flat)[0, 0], j.square().sum(-1))


class Shapes(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.p, self.q, self.function = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(3, 4)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p, self.q)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p, q: functional.linear(x, p.expand_as(q)).tanh() + functional.linear(x, q),
        lambda x, p, q: functional.linear(x.to(p), p + q),
        lambda x, p, q: torch.mm(x, mat2=q.t()) * functional.linear(x, p),
        lambda x, p, q: functional.linear(x.type_as(q), q) + p.repeat(len(x), 1)[:, :3],
        lambda x, p, q: (
            (functional.linear(x, q), p.sum().expand(len(x), 3))[0] + torch.tanh(p.repeat(len(x), 1))[:, 1:]
        ),
    ],
)
def test_arguments_read_for_their_shape(function) -> None:
    torch.manual_seed(0)
    module, x = Shapes(function).double(), torch.randn(5, 4, dtype=torch.float64)
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    j = reference_jacobian(module, x)
    torch.testing.assert_close(backend.gram(x[None], x[None])[0, 0], j @ j.T)
    v = torch.randn(1, 2, j.shape[1], dtype=torch.float64)
    torch.testing.assert_close(backend.jvp(x[None], v)[0], v[0] @ j.T)


def test_rows_along_a_spatial_axis_are_no_convolution_of_rows() -> None:
    class Spatial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.head = nn.Parameter(torch.randn(3, 1, 1, 2)), nn.Linear(9, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = functional.conv2d(x.view(1, 1, len(x), 4), self.w)
            return self.head(torch.tanh(h[0].transpose(0, 1).flatten(1)))

    torch.manual_seed(0)
    module, x = Spatial().double(), torch.randn(5, 4, dtype=torch.float64)
    j = reference_jacobian(module, x)
    torch.testing.assert_close(gpntk.NTKKernel(module)(x).to_dense(), j @ j.T)


def test_what_torch_func_cannot_run_goes_by_factors() -> None:
    class Old(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(3, 4), nn.Linear(4, 3)
            self.register_buffer("twos", torch.full((4,), 2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Doubled.apply(torch.tanh(self.first(x)), self.twos))

    torch.manual_seed(0)
    module, x = Old().double(), torch.randn(5, 3, dtype=torch.float64)
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    j, u = reference_jacobian(module, x), torch.randn(1, 1, 15, dtype=torch.float64)
    torch.testing.assert_close(backend.vjp(x[None], u)[0], u[0] @ j)


def test_an_identity_readout_beside_an_entangled_layer() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.aux = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out = self.head(x)
            return out, functional.linear(out, self.aux.weight) @ self.aux.weight

    torch.manual_seed(0)
    module, x = Auxiliary().double(), torch.randn(5, 4, dtype=torch.float64)
    network = gpntk.freeze(module, ["head.*", "aux.weight"], extract=lambda returned: returned[0])
    backend = gpntk.jacobians.StructuredBackend(network)
    j = backend.jacobian(x[None])[0]
    torch.testing.assert_close(backend.gram(x[None], x[None])[0, 0], j @ j.T)
    assert (j[:, 15:] == 0).all()
