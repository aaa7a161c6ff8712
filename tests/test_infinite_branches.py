"""Which networks have a limit by the rules: wrong ones are refused on construction, and what is accepted is right."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.errors import InputError, UnsupportedLayerError
from gpntk.infinite import Activation, Quadrature
from gpntk.infinite.closed_forms import ABReLU, Erf, Gaussian, RectifiedMonomial, Step, rbf

W, B = 1.3, 0.4
KERNELS = [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel]
WIDTH = 6


class Net(nn.Module):
    """Layers by name, and a forward pass."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def dense(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Net:
    """With layers a: 3 to width, b and c: width to width, o: width to 1."""
    named = {"a": nn.Linear(3, WIDTH), "b": nn.Linear(WIDTH, WIDTH), "c": nn.Linear(WIDTH, WIDTH)}
    return Net(forward, **{**named, "o": nn.Linear(WIDTH, 1), **layers})


def images(forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Net:
    """For images 2 x 4 x 4: convolutions a and b, o of flattened positions, p of pooled ones."""
    named = {"a": nn.Conv2d(2, WIDTH, 3, padding=1), "b": nn.Conv2d(WIDTH, WIDTH, 3, padding=1)}
    return Net(forward, **{**named, "o": nn.Linear(16 * WIDTH, 1), "p": nn.Linear(WIDTH, 1), **layers})


def build(module: nn.Module, shape: tuple[int, ...], kind: type = gpntk.InfiniteNTKKernel) -> Any:
    return kind(module, W, B, input_shape=shape).double()


def value(module: nn.Module, shape: tuple[int, ...], kind: type = gpntk.InfiniteNTKKernel, rows: int = 4) -> Tensor:
    x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).flatten(1)
    return build(module, shape, kind)(x).to_dense().detach()


def both(module: nn.Module, shape: tuple[int, ...], rows: int = 4) -> Tensor:
    return torch.stack(
        [value(module, shape, kind, rows) for kind in (gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel)]
    )


# --- what is refused ----------------------------------------------------------------------------------------------


def sequence(*values: Any) -> Any:
    return values[-1]


def skip_over_two(net: Any, x: Tensor) -> Tensor:
    h0 = net.a(x)
    h1 = h0 + net.b(torch.relu(h0))
    return net.o(torch.relu(h1 + net.c(torch.relu(h1)) + h0))


def in_place_sum(net: Any, x: Tensor) -> Tensor:
    h = kept = net.a(x)
    h += net.b(torch.relu(h))
    return net.o(torch.relu(kept))


def of_view(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    torch.relu_(h.view(-1, WIDTH))
    return net.o(h)


def hooked(module: nn.Module) -> nn.Module:
    """As the older weight and spectral norms of torch do it."""
    module.register_forward_pre_hook(lambda _module, arguments: arguments)
    return module


NORM = nn.LayerNorm(WIDTH)
DENSE: dict[str, tuple[nn.Module, str]] = {
    "h + relu(h)": (dense(lambda n, x: sequence(h := n.a(x), n.o(h + torch.relu(h)))), "made of the outputs of a"),
    "h + 2 h": (dense(lambda n, x: sequence(h := n.a(x), n.o(torch.relu(h + 2 * h)))), "made of the outputs of a"),
    "h - h": (dense(lambda n, x: sequence(h := n.a(x), n.o(h - h))), "made of the outputs of a"),
    "long skip": (dense(skip_over_two), "made of the outputs of a"),
    "h + norm(h)": (dense(lambda n, x: sequence(h := n.a(x), n.o(h + n.l(h))), l=NORM), "made of the outputs of a"),
    "relu + relu": (dense(lambda n, x: n.o(torch.relu(n.a(x)) + torch.relu(n.d(x))), d=nn.Linear(3, WIDTH)), "not ind"),
    "norm of relu": (dense(lambda n, x: n.o(n.l(torch.relu(n.a(x)))), l=NORM), "subtracts the mean"),
    "norm of input": (nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1)), "subtracts the mean"),
    "norm of input sum": (
        dense(lambda n, x: n.o(n.l(x + n.d(x))), d=nn.Linear(3, 3), l=nn.LayerNorm(3), o=nn.Linear(3, 1)), "subtracts"
    ),
    "relu of cat": (
        dense(lambda n, x: n.o(torch.tanh(torch.cat([n.a(x), n.d(x)], 1))), d=nn.Linear(3, 4), o=nn.Linear(10, 1)),
        "not Gaussian",
    ),
    "relu of dropped": (nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 1)), "not Gaussian"),
    "relu of relu": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 1)), "not Gaussian"),
    "dropout of all": (nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(1.0), nn.Linear(4, 1)), "leaves no unit"),
    "floor": (dense(lambda n, x: n.o(torch.div(n.a(x), 0.5, rounding_mode="floor"))), "rounding_mode"),
    "relu_ dropped": (dense(lambda n, x: sequence(h := n.a(x), torch.relu_(h), n.o(h))), "changes a in place"),
    "ReLU(inplace)": (
        dense(lambda n, x: sequence(h := n.a(x), n.o(n.b(n.r(h)) + h)), r=nn.ReLU(inplace=True)), "changes a in place"
    ),
    "add_ dropped": (
        dense(lambda n, x: sequence(h := n.a(x), h.add_(n.b(torch.relu(h))), n.o(h))), "changes a in place"
    ),
    "+= of an alias": (dense(in_place_sum), "changes a in place"),
    "relu_ of a view": (dense(of_view), "changes a in place"),
    "chunk": (dense(lambda n, x: n.o(torch.cat(n.a(x).chunk(2, 1), 1))), r"chunk \(chunk\) has no known limit"),
    "value": (dense(lambda n, x: n.o(n.a(x)) * x.sum().item()), "has no known limit"),
    "times rows": (dense(lambda n, x: n.o(n.a(x) * x.size(0))), "a number"),
    "pad channels": (dense(lambda n, x: n.o(functional.pad(n.a(x), (1, 1))), o=nn.Linear(8, 1)), "only positions"),
    "Softplus": (nn.Sequential(nn.Linear(3, 4), nn.Softplus(1.0, 1.0), nn.Linear(4, 1)), "no known limit"),
    "hooks": (nn.Sequential(hooked(nn.Linear(3, 4)), nn.ReLU(), nn.Linear(4, 1)), "0: it has hooks"),
    "parametrized": (
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 1)), "0: it is parametrized"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_refused_on_construction(name: str) -> None:
    module, message = DENSE[name]
    with pytest.raises(UnsupportedLayerError, match=message):
        build(module, (3,))


IMAGES = {
    "h + pool(h)": (
        images(lambda n, x: sequence(h := n.a(x), n.o((h + n.q(h)).flatten(1))), q=nn.AvgPool2d(3, 1, 1)), "both"
    ),
    "tanh of flattened": (images(lambda n, x: n.o(torch.tanh(n.a(x).flatten(1)))), "not Gaussian"),
    "pad channels": (images(lambda n, x: n.o(functional.pad(n.a(x), (0, 0, 0, 0, 1, 1)).flatten(1))), "does not run"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_images_refused_on_construction(name: str) -> None:
    module, message = IMAGES[name]
    with pytest.raises((UnsupportedLayerError, InputError), match=message):
        build(module, (2, 4, 4))


TOKENS = {
    "reshape(-1, C)": dense(lambda n, x: n.o(torch.relu(n.a(x)).reshape(-1, WIDTH))),
    "flatten(0, 1)": dense(lambda n, x: n.o(torch.relu(n.a(x)).flatten(0, 1))),
}


@pytest.mark.parametrize("name", TOKENS)
def test_rows_stay_rows(name: str) -> None:
    with pytest.raises(UnsupportedLayerError, match="has no axis of inputs"):
        build(TOKENS[name], (5, 3))


def test_a_number_of_rows_that_is_written_down_is_refused() -> None:
    module = dense(lambda n, x: n.o(torch.relu(n.a(x)).view(2, -1)), o=nn.Linear(5 * WIDTH, 1))
    with pytest.raises(InputError, match="does not run"):
        build(module, (5, 3))


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"dtype=torch\.float64 has no rule"):
        build(dense(lambda n, x: n.o(n.a(x).mean(1, dtype=torch.float64))).double(), (5, 3))


def test_tied_parameters_are_refused() -> None:
    module = dense(lambda n, x: n.o(n.b(torch.relu(n.a(x))) + n.c(torch.relu(n.a2(x)))), a2=nn.Linear(3, WIDTH))
    build(module, (3,))
    module.c.weight = module.b.weight
    with pytest.raises(UnsupportedLayerError, match="c: it shares parameters with b"):
        build(module, (3,))


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match="one or two axes of positions"):
        build(nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(32, 1)), (2, 2, 2, 3))
    with pytest.raises(InputError, match="lazy"):
        build(nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.Linear(4, 1)), (3,))


# --- what is accepted -----------------------------------------------------------------------------------------------


def relu_step(k: Tensor) -> Tensor:
    q = k.diagonal()
    return ABReLU(0.0, 1.0).moments(q[:, None].expand_as(k), q.expand_as(k), k)[0]


def layer(k: Tensor) -> Tensor:
    return W**2 * k + B**2


def inputs(rows: int = 4) -> Tensor:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x @ x.mT / 3


def test_residual_chain_by_hand() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h = net.a(x)
        h += net.b(torch.relu(h))
        return net.o(torch.relu(torch.add(h, net.c(torch.relu(h)), alpha=3)))

    h = layer(inputs())
    h = h + layer(relu_step(h))
    expected = layer(relu_step(h + 9 * layer(relu_step(h))))
    result = value(dense(forward), (3,), gpntk.InfiniteNNGPKernel)
    # The recursion above rounds at equal rows.
    torch.testing.assert_close(result, expected, rtol=1e-7, atol=0)


def test_branch_of_the_input_and_norm_of_centred_units() -> None:
    k = inputs()
    module = dense(lambda n, x: n.o(x + n.d(x)), d=nn.Linear(3, 3), o=nn.Linear(3, 1))
    torch.testing.assert_close(value(module, (3,), gpntk.InfiniteNNGPKernel), layer(k + layer(k)))
    wide = {"d": nn.Linear(3, 2), "o": nn.Linear(8, 1), "l": nn.LayerNorm(8, eps=1e-300)}
    module = dense(lambda n, x: n.o(n.l(torch.cat([n.a(x), 5 * n.d(x)], 1))), **wide)
    correlation = layer(k) / (layer(k).diagonal()[:, None] * layer(k).diagonal()).sqrt()
    torch.testing.assert_close(value(module, (3,), gpntk.InfiniteNNGPKernel), layer(correlation))


def pooled_and_flattened(net: Any, x: Tensor, other: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    h = net.a(x)
    return net.o((h + net.b(torch.relu(h))).flatten(1)) + net.p(other(h, x).mean((2, 3)))


@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("side", [4, 5])
def test_pairs_of_positions_beside_equal_ones(rows: int, side: int) -> None:
    # The last layers of both branches are independent: it does not matter whether their inputs are.
    layers = {"c": nn.Conv2d(2, WIDTH, 3, padding=1), "o": nn.Linear(4 * side * WIDTH, 1)}
    one = images(lambda n, x: pooled_and_flattened(n, x, lambda h, _: h), **layers)
    two = images(lambda n, x: pooled_and_flattened(n, x, lambda _, x: n.c(x)), **layers)
    shape = (2, 4, side)
    torch.testing.assert_close(both(one, shape, rows), both(two, shape, rows), rtol=1e-12, atol=1e-12)


def test_concatenated_pairs_beside_equal_ones() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        h, g = net.a(x), net.c(x)
        return net.o(torch.cat([h, torch.relu(g)], 1).flatten(1)) + net.p(h.mean((2, 3)))

    def apart(net: Any, x: Tensor) -> Tensor:
        h, g = net.a(x), net.c(x)
        return net.o(torch.cat([h, torch.relu(g)], 1).flatten(1)) + net.p(net.e(x).mean((2, 3)))

    layers = {name: nn.Conv2d(2, WIDTH, 3, padding=1) for name in "ce"}
    one, two = (images(function, **layers, o=nn.Linear(32 * WIDTH, 1)) for function in (forward, apart))
    torch.testing.assert_close(both(one, (2, 4, 4)), both(two, (2, 4, 4)), rtol=1e-12, atol=1e-12)


SAME = {
    "size(0)": lambda n, x: n.o(torch.relu(n.a(x)).view(x.size(0), -1)),
    "shape[0]": lambda n, x: n.o(torch.relu(n.a(x)).view(x.shape[0], -1)),
    "reshape of sizes": lambda n, x: n.o(torch.relu(n.a(x)).reshape(x.size(0), x.size(2) * x.size(3) * WIDTH)),
    "permuted": lambda n, x: n.o(torch.permute(torch.relu(n.a(x)), dims=(0, 2, 3, 1)).flatten(1)),
    "method": lambda n, x: n.o(torch.relu(n.a(x)).permute(dims=(0, 3, 1, 2)).flatten(1)),
    "in place": lambda n, x: n.o(torch.relu_(n.a(x)).flatten(1)),
    "scaled": lambda n, x: n.o(torch.mul(torch.relu(n.a(x)).mul(0.5), other=2).flatten(1)),
    "by a size": lambda n, x: n.o((torch.relu(n.a(x)) / x.size(1)).flatten(1).mul_(2)),
}


@pytest.mark.parametrize("name", SAME)
def test_idioms_for_the_same_network(name: str) -> None:
    expected = both(images(lambda n, x: n.o(torch.relu(n.a(x)).flatten(1))), (2, 4, 4))
    torch.testing.assert_close(both(images(SAME[name]), (2, 4, 4)), expected, rtol=1e-12, atol=0)


class Masked(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, factor: float = 1.0) -> Tensor:  # pyright: ignore
        h = self.a(x)
        if mask is not None:
            h = h * mask
        return self.o(torch.relu(h))


def test_optional_arguments_have_their_defaults() -> None:
    layers = {"a": nn.Linear(3, WIDTH), "o": nn.Linear(WIDTH, 1)}
    expected = both(Net(lambda n, x: n.o(torch.relu(n.a(x))), **layers), (3,))
    torch.testing.assert_close(both(Masked(lambda *_: None, **layers), (3,)), expected)


def test_mean_by_axis() -> None:
    one, two = (dense(f) for f in (lambda n, x: n.o(n.a(x).mean(axis=1)), lambda n, x: n.o(n.a(x).mean(1))))
    torch.testing.assert_close(both(one, (5, 3)), both(two, (5, 3)))


def test_networks_keep_their_mode() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
    module[2].eval()
    build(module, (3,))
    assert [child.training for child in module] == [True, True, False, True]


# --- activations without a module of torch ---------------------------------------------------------------------------

OWN = {
    "atan": (Quadrature(torch.atan), torch.atan),
    "kinked": (Quadrature(lambda x: (x - 1).abs(), kinks=(1.0,)), lambda x: (x - 1).abs()),
    "gaussian": (Gaussian(2.0, 0.7), lambda x: 2 * (-0.7 * x**2).exp()),
    "step": (Step(), lambda x: torch.heaviside(x, torch.tensor(0.5, dtype=x.dtype))),
    "rectified": (RectifiedMonomial(2), lambda x: x.clamp(min=0) ** 2),
    "erf": (Erf(0.5, 0.4, 0.5), lambda x: 0.5 * torch.erf(0.4 * x) + 0.5),
    "rbf": (rbf(0.3), lambda x: 2**0.5 * torch.sin(0.6**0.5 * x + torch.pi / 4)),
    "leaky": (ABReLU(0.2, 1.0), lambda x: functional.leaky_relu(x, 0.2)),
}


@pytest.mark.parametrize("name", OWN)
def test_activations_as_layers(name: str) -> None:
    activation, function = OWN[name]
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(Activation(activation)(x), function(x))
    kernel = build(
        nn.Sequential(nn.Linear(3, 4), Activation(activation), nn.Linear(4, 1)), (3,), gpntk.InfiniteNNGPKernel
    )
    x = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = torch.linalg.cholesky(layer(x @ x.mT / 3)) @ torch.randn(3, 400_000, dtype=torch.float64)
    samples = function(h)
    moments, squares = samples @ samples.mT / 400_000, samples**2 @ (samples**2).mT / 400_000
    error = (kernel(x).to_dense() - layer(moments)).abs()
    assert (error <= 4 * W**2 * ((squares - moments**2) / 400_000).sqrt() + 1e-12).all()


def test_gaussian_kernel_of_a_network() -> None:
    k = layer(inputs())
    distances = k.diagonal()[:, None] + k.diagonal() - 2 * k
    module = nn.Sequential(nn.Linear(3, 4), Activation(rbf(0.5)), nn.Linear(4, 1))
    result = value(module, (3,), gpntk.InfiniteNNGPKernel)
    torch.testing.assert_close(result, layer((-distances / 2).exp()), rtol=1e-12, atol=0)


def test_only_activations_are_wrapped() -> None:
    with pytest.raises(InputError, match="wrap a function in Quadrature"):
        Activation(torch.atan)


def test_kernels_can_be_pickled() -> None:
    network = nn.Sequential(
        nn.Conv2d(2, WIDTH, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4 * WIDTH, 1)
    )
    kernel = build(network, (2, 4, 4))
    x = torch.randn(3, 32, dtype=torch.float64)
    copy = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(copy(x).to_dense(), kernel(x).to_dense())


# --- the same network in other words ---------------------------------------------------------------------------------


def hidden(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), *modules, nn.Linear(6, 1))


POOLED = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 1))
PLAIN = {"a": nn.Linear(5, 6), "b": nn.Linear(6, 1)}
CONVOLUTION = {"a": nn.Conv2d(3, 6, 3), "b": nn.Linear(6, 1)}
SPELLINGS: dict[str, tuple[nn.Module, nn.Module, tuple[int, ...], tuple[int, ...] | None]] = {
    "abs": (Net(lambda s, x: s.b(abs(s.a(x))), **PLAIN), hidden(Activation(ABReLU(-1.0, 1.0))), (5,), None),
    "erf": (Net(lambda s, x: s.b(torch.special.erf(s.a(x))), **PLAIN), hidden(Activation(Erf())), (5,), None),
    "one layer": (nn.Linear(5, 1), nn.Sequential(nn.Linear(5, 1)), (5,), None),
    "sum from zero": (Net(lambda s, x: s.b(sum([torch.relu(s.a(x))])), **PLAIN), hidden(nn.ReLU()), (5,), None),
    "keepdim": (
        Net(lambda s, x: s.b(torch.relu(s.a(x)).mean((2, 3), keepdim=True).flatten(1)), **CONVOLUTION),
        POOLED,
        (3, 5, 5),
        None,
    ),
    "sum, keepdim": (
        Net(lambda s, x: s.b(torch.relu(s.a(x)).sum((2, 3), keepdim=True).flatten(1) / 9), **CONVOLUTION),
        POOLED,
        (3, 5, 5),
        None,
    ),
    "squeeze": (
        Net(
            lambda s, x: s.b(functional.adaptive_avg_pool2d(torch.relu(s.a(x)), 1).squeeze(-1).squeeze(2)).squeeze(-1),
            **CONVOLUTION,
        ),
        POOLED,
        (3, 5, 5),
        None,
    ),
    "squeeze of nothing": (
        Net(lambda s, x: s.b(torch.relu(s.a(x)).squeeze(2).mean((2, 3))), **CONVOLUTION),
        POOLED,
        (3, 5, 5),
        None,
    ),
    "channels last": (
        Net(lambda s, x: s.b(torch.relu(s.a(x.permute(0, 3, 1, 2))).mean((2, 3))), **CONVOLUTION),
        POOLED,
        (3, 5, 5),
        (5, 5, 3),
    ),
    "mean of the input": (
        Net(lambda s, x: s.b(x.mean((2, 3))), b=nn.Linear(3, 1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1)),
        (3, 5, 5),
        None,
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("kernel_class", KERNELS)
def test_spellings(name: str, kernel_class: Callable[..., gpntk.InfiniteNTKKernel]) -> None:
    spelled, plain, shape, other = SPELLINGS[name]
    x = torch.randn(3, *shape).double()
    moved = x if other is None else x.movedim(1, -1)
    kernel = kernel_class(spelled, 1.3, 0.2, input_shape=other or shape).double()
    expected = kernel_class(plain, 1.3, 0.2, input_shape=shape).double()(x.flatten(1)).to_dense()
    torch.testing.assert_close(kernel(moved.flatten(1)).to_dense(), expected, rtol=1e-12, atol=1e-13)


def test_unknown_functions_may_be_wrapped() -> None:
    with pytest.raises(UnsupportedLayerError, match=r"atan .*gpntk\.infinite\.Activation"):
        gpntk.InfiniteNTKKernel(Net(lambda s, x: s.b(torch.atan(s.a(x))), **PLAIN))
