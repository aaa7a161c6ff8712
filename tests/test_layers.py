"""Each rule against its autodiff twin, over its options: products by the rule and by explicit float64 Jacobians."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.jacobians.rules import LinearRule, weight_sharing
from gpntk.jacobians.rules.weight_sharing import Positions
from gpntk.testing import check_rule
from tests.cases import reference_jacobian
from tests.test_architectures import assert_products

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


class Pooled(nn.Module):
    """A layer, a nonlinearity and a fixed projection to C outputs, so that every cotangent is different."""

    def __init__(self, layer: nn.Module, outputs: int, repeats: int = 1) -> None:
        super().__init__()
        self.layer, self.outputs, self.repeats = layer, outputs, repeats

    def forward(self, x: Tensor) -> Tensor:
        h = sum(self.layer(x + k) for k in range(self.repeats))
        assert isinstance(h, Tensor)
        h = torch.tanh(h).flatten(1)
        angles = torch.arange(h.shape[1] * self.outputs, dtype=h.dtype, device=h.device).view(-1, self.outputs)
        return h @ angles.cos()


def check(module: nn.Module, shape: tuple[int, ...], tolerance: float = 1e-10) -> None:
    module = module.double()
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(rows, *shape, dtype=torch.float64, generator=generator) for rows in (4, 3)]
    js = [reference_jacobian(module, x) for x in xs]
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module, input_shape=shape))
    assert_products(backend, [x.flatten(1) for x in xs], js, tolerance)
    torch.testing.assert_close(backend.jacobian(xs[0].flatten(1)[None])[0], js[0])


@settings(max_examples=60, deadline=None)
@given(
    dims=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    outputs=st.integers(1, 3),
    repeats=st.integers(1, 2),
)
def test_convolutions(
    dims, transposed, groups, channels, kernel, stride, padding, dilation, bias, outputs, repeats
) -> None:
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": bias}
    if transposed:
        options["output_padding"] = min(1, max(stride, dilation) - 1)
    layer = CONVOLUTIONS[dims, transposed](channels[0] * groups, channels[1] * groups, kernel, **options)
    # Room for the dilated kernel, and for what a transposed convolution's padding takes away.
    side = {1: 9, 2: 6, 3: 5}[dims]
    check(Pooled(layer, outputs, repeats), (channels[0] * groups, *(side + d for d in range(dims))))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("kernel", [2, 3])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
def test_paddings(padding: str, kernel: int, mode: str) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, kernel, padding=padding, padding_mode=mode)
    if padding == "same" and kernel == 2 and mode == "zeros":
        with pytest.raises(
            gpntk.errors.UnruledError, match=r"'layer.weight' has no structured rule: it is used by conv2d"
        ):
            gpntk.jacobians.StructuredBackend(gpntk.freeze(Pooled(layer, 2), input_shape=(2, 5, 5))).check(
                torch.randn(1, 3, 50)
            )
        return
    check(Pooled(layer, 2), (2, 5, 5))


def test_a_late_convolution_goes_by_patches() -> None:
    # More weights per output channel than positions in all rows.
    torch.manual_seed(0)
    check(Pooled(nn.Conv2d(12, 3, 3, padding=1), 2), (12, 2, 2))


@pytest.mark.parametrize(
    ("sizes", "way"),
    [
        ((1, 2, 40, 30), "pairs"),
        ((2, 30, 3, 4), "gradients"),
        ((4, 3, 50, 30), "pairs"),
        ((1, 50, 3, 4), "gradients"),
    ],
)
def test_every_way_of_a_shared_weight(sizes: tuple[int, int, int, int], way: str) -> None:
    c, t, i, o = sizes
    assert weight_sharing.cheapest(*sizes)[0] == way
    generator = torch.Generator().manual_seed(0)
    left, right = (
        Positions(
            torch.randn(2, n, t, i, dtype=torch.float64, generator=generator),
            torch.randn(2, n, c, t, o, dtype=torch.float64, generator=generator),
        )
        for n in (5, 3)
    )
    one, two = (torch.einsum("bncto,bnti->bncoi", p.g, p.a).flatten(3) for p in (left, right))

    torch.testing.assert_close(weight_sharing.gram(left, right), torch.einsum("bncp,bmdp->bncmd", one, two))
    torch.testing.assert_close(weight_sharing.gram(left, left), torch.einsum("bncp,bmdp->bncmd", one, one))
    torch.testing.assert_close(weight_sharing.diagonal(left), one.square().sum(-1))


@settings(max_examples=25, deadline=None)
@given(vocabulary=st.integers(2, 5), positions_=st.integers(1, 5), padding=st.sampled_from([None, 0, -1]))
def test_embeddings(vocabulary: int, positions_: int, padding: int | None) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(vocabulary, 3, padding_idx=padding)

        def forward(self, x: Tensor) -> Tensor:
            h = self.table((x.abs() * 3).long() % vocabulary).tanh().flatten(1)
            return torch.stack([h.sum(1), h.cumsum(1).sin().sum(1)], 1)

    torch.manual_seed(positions_)
    check(Tokens(), (positions_,))


class Uses(nn.Module):
    """A parameter that broadcasts over rows, in every function that has a rule for it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.p, self.function = nn.Parameter(torch.randn(4) + 2), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(x, self.p)
        return torch.stack([h.sin().flatten(1).sum(1), h.square().flatten(1).sum(1)], 1)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, p: x + p,
        lambda x, p: p + x,
        lambda x, p: p - x,
        lambda x, p: x - p,
        lambda x, p: 2 - p - x,
        lambda x, p: x * p,
        lambda x, p: x / p,
        lambda x, p: p / (2 + x.sin()),
        lambda x, p: x.clone().add_(p).mul_(p),
        lambda x, p: torch.addcmul(x, p, x),
        lambda x, p: torch.lerp(x, 2 * x, p),
        lambda x, p: torch.where(x > 0, x, p),
        torch.maximum,
        lambda x, p: torch.cat([p.expand(len(x), 1, 4), x], 1),
        lambda x, p: torch.cat([p.view(1, 1, 4).repeat(len(x), 1, 1), x], 1),
        lambda x, p: torch.cat([p[None, None].expand(len(x), -1, -1), x], 1),
        lambda x, p: x + p[:3].unsqueeze(-1),
        lambda x, p: x * p.exp() + p,
        lambda x, p: (x.flatten(0, 1) * p).unflatten(0, (-1, 3)),
        lambda x, p: (x.transpose(0, 1).flatten(0, 1) * p).unflatten(0, (3, -1)).transpose(0, 1),
        lambda x, p: x.transpose(0, 1).add(p).transpose(0, 1),
        lambda x, p: functional.layer_norm(x, (4,), p, p * 2),
        lambda x, p: x * torch.outer(p, p)[:3],
    ],
)
def test_parameters_that_broadcast_over_rows(function) -> None:
    torch.manual_seed(0)
    check(Uses(function), (3, 4))


class Matrix(nn.Module):
    """A matrix used as a linear map in many guises."""

    def __init__(self, function, shape: tuple[int, ...] = (4, 4)) -> None:
        super().__init__()
        self.w, self.function = nn.Parameter(torch.randn(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(x, self.w)
        return torch.stack([h.sin().flatten(1).sum(1), h.square().flatten(1).cumsum(1).cos().sum(1)], 1)


@pytest.mark.parametrize(
    "function",
    [
        functional.linear,
        lambda x, w: functional.linear(x, w.t()),
        lambda x, w: x @ w,
        lambda x, w: x @ w.mT,
        lambda x, w: torch.matmul(x, w.T),
        lambda x, w: torch.mm(x[:, 0], w),
        lambda x, w: functional.linear(x, w) + x @ w,
        lambda x, w: functional.linear(functional.linear(x, w).tanh(), w),
        lambda x, w: functional.linear(functional.linear(x, w).tanh(), w.t()),
        lambda x, w: functional.linear(x, w[:2]),
        lambda x, w: functional.linear(x, torch.cat([w, w.flip(0)])),
        lambda x, w: functional.linear(x, w / w.norm()),
        lambda x, w: functional.linear(x, w, w.sum(0)),
        lambda x, w: functional.linear(x, w.view(2, 8)[:, :4]),
        lambda x, w: functional.conv1d(x, w.unsqueeze(-1)[:, :3]),
        lambda x, w: functional.linear(x.transpose(0, 1), w).transpose(0, 1),
        lambda x, w: functional.linear(x.transpose(0, 1).reshape(-1, 4), w).view(3, -1, 4).transpose(0, 1),
        lambda x, w: functional.linear(x.reshape(-1, 4), w).view(-1, 3, 4),
        lambda x, w: functional.linear(x, w).add_(x).mul_(2.0),
    ],
)
def test_matrices_in_many_guises(function) -> None:
    torch.manual_seed(0)
    check(Matrix(function), (3, 4))


@pytest.mark.parametrize("name", ["conv", "norm", "attention", "embedding"])
def test_second_derivatives_in_x(name: str) -> None:
    torch.manual_seed(0)
    layers = {
        "conv": nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 1)),
        "norm": nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2), nn.Tanh(), nn.Linear(2, 1)),
        "attention": nn.Sequential(
            nn.Unflatten(1, (3, 2)),
            nn.TransformerEncoderLayer(2, 1, 3, 0.0, batch_first=True),
            nn.Flatten(),
            nn.Linear(6, 1),
        ),
        "embedding": nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.PReLU(3), nn.Linear(3, 1)),
    }
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(layers[name].double().eval()))
    x = torch.randn(1, 2, 6, dtype=torch.float64, requires_grad=True)
    u = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 1, backend.num_features, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: backend.gram(x, x), (x,))
    assert torch.autograd.gradgradcheck(backend.diagonal, (x,))
    assert torch.autograd.gradgradcheck(backend.jvp, (x, v))
    assert torch.autograd.gradcheck(backend.vjp, (x, u))


def numbers(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


CALLS = {
    "linear": (functional.linear, numbers(4, 3), numbers(2, 3), numbers(2)),
    "linear at positions": (functional.linear, numbers(4, 5, 3), numbers(2, 3), numbers(2)),
    "linear at many positions": (functional.linear, numbers(4, 50, 3), numbers(2, 3)),
    "matmul": (torch.matmul, numbers(4, 3), numbers(3, 2)),
    "bilinear": (functional.bilinear, numbers(4, 3), numbers(4, 5), numbers(2, 3, 5), numbers(2)),
    "bilinear at positions": (functional.bilinear, numbers(4, 6, 3), numbers(4, 6, 5), numbers(2, 3, 5)),
    "conv1d": (torch.conv1d, numbers(4, 2, 7), numbers(3, 2, 3), numbers(3)),
    "conv2d in groups": (torch.conv2d, numbers(4, 4, 6, 5), numbers(6, 2, 3, 2), numbers(6), 2, 1, 1, 2),
    "conv_transpose2d": (torch.conv_transpose2d, numbers(4, 3, 4, 3), numbers(3, 2, 3, 2), numbers(2), 2),
    "embedding": (functional.embedding, torch.tensor([[0, 1, 1], [2, 2, 2], [3, 0, 1], [1, 3, 0]]), numbers(4, 3)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_rule_obeys_the_laws(call: tuple) -> None:
    check_rule(*call)


def test_laws_find_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = LinearRule.gradients
    monkeypatch.setattr(
        LinearRule, "gradients", lambda self, factors: {own: 1.01 * g for own, g in right(self, factors).items()}
    )
    with pytest.raises(AssertionError, match=r"gradients of 'weight': relative error .* exceeds 1.0e-10"):
        check_rule(functional.linear, numbers(4, 3), numbers(2, 3))
    with pytest.raises(AssertionError, match="no rule takes this call"):
        check_rule(torch.sin, numbers(4, 3))
