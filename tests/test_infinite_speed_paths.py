"""Paths of the infinite-width kernels that exist for speed or memory, against plain formulas written out here."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import gpntk
from gpntk.infinite import AbstractActivation, Quadrature, near_parallel
from gpntk.infinite.closed_forms import ABReLU
from gpntk.infinite.gaussian import determinant
from gpntk.infinite.panels import Elementwise
from gpntk.infinite.recursion import equal_pairs, row_numbers

D = torch.float64
KERNELS = [gpntk.InfiniteNNGPKernel, gpntk.InfiniteNTKKernel]


def relu_network(inputs: int = 4, depth: int = 2) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Linear(8 if index else inputs, 8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(8, 1))


def pooled(size: int = 5, channels: int = 2) -> nn.Sequential:
    first, second = nn.Conv2d(channels, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        first, nn.ReLU(), nn.AvgPool2d(2, 1), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1)
    )


# --- convolutions ---------------------------------------------------------------------------------------------------


def patches(size: tuple[int, int], conv: nn.Conv2d) -> Tensor:
    """Which input position (last axis, of H W) each output position (first) sees at each tap (second), as 0 and 1.

    Read off from torch's own unfold.
    """
    h, w = size
    eye = torch.eye(h * w, dtype=D).reshape(h * w, 1, h, w)
    pad = (int(conv.padding[1]),) * 2 + (int(conv.padding[0]),) * 2
    eye = functional.pad(eye, pad, mode="circular" if conv.padding_mode == "circular" else "constant")
    return functional.unfold(eye, conv.kernel_size, stride=conv.stride).permute(2, 1, 0)


def convolved(x1: Tensor, x2: Tensor, conv: nn.Conv2d, w: float, b: float) -> tuple[Tensor, Tensor]:
    """NNGP and NTK of conv, ReLU, mean over positions, Linear: sums over taps written out."""
    sees = patches((x1.shape[-2], x1.shape[-1]), conv)
    taps = sees.shape[1]

    def covariance(a: Tensor, c: Tensor) -> Tensor:
        k = torch.einsum("ncp,mcq->nmpq", a.flatten(2), c.flatten(2)) / a.shape[1]
        return w**2 * torch.einsum("otp,nmpq,utq->nmou", sees, k, sees) / taps + b**2

    cross, one, two = covariance(x1, x2), covariance(x1, x1), covariance(x2, x2)
    q1 = torch.stack([one[i, i].diagonal() for i in range(len(x1))])[:, None, :, None]
    q2 = torch.stack([two[i, i].diagonal() for i in range(len(x2))])[None, :, None, :]
    scale = (q1 * q2).sqrt()
    theta = torch.acos((cross / scale).clamp(-1, 1))
    nngp = scale / (2 * math.pi) * (theta.sin() + (math.pi - theta) * theta.cos())
    ntk = cross * (math.pi - theta) / (2 * math.pi)
    nngp, ntk = nngp.mean((2, 3)), ntk.mean((2, 3))
    return w**2 * nngp + b**2, w**2 * nngp + b**2 + w**2 * ntk


@settings(max_examples=25, deadline=None)
@given(
    size=st.tuples(st.integers(3, 6), st.integers(3, 6)),
    taps=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    circular=st.booleans(),
)
def test_shifted_sums_are_convolutions(
    size: tuple[int, int], taps: tuple[int, int], stride: int, padding: int, circular: bool
) -> None:
    # Where padding is wider than the filter, some windows see nothing else.
    mode = "circular" if circular else "zeros"
    conv = nn.Conv2d(2, 4, taps, stride=stride, padding=padding, padding_mode=mode)
    x1, x2 = torch.randn(2, 2, *size, dtype=D), torch.randn(3, 2, *size, dtype=D)
    module = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1))
    for kernel_class, expected in zip(KERNELS, convolved(x1, x2, conv, 1.5, 0.25), strict=True):
        kernel = kernel_class(module, input_shape=(2, *size)).double()
        kernel.weight_std, kernel.bias_std = torch.tensor([1.5], dtype=D), torch.tensor([0.25], dtype=D)
        value = kernel(x1.flatten(1), x2.flatten(1)).to_dense()
        torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("channels", [2, 30])
def test_inputs_of_few_and_many_channels(channels: int) -> None:
    # Sums over channels and matrix products: the same network on inputs with channels repeated.
    x = torch.randn(3, 2, 4, 4, dtype=D)
    repeated = x.repeat(1, channels // 2, 1, 1)
    values = []
    for given_x, inputs in ((x, 2), (repeated, channels)):
        module = nn.Sequential(nn.Conv2d(inputs, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1))
        kernel = gpntk.InfiniteNTKKernel(module, input_shape=(inputs, 4, 4)).double()
        values.append(kernel(given_x.flatten(1)).to_dense())
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


# --- blocks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel_class", KERNELS)
@pytest.mark.parametrize("budget", [1, 2**13, 2**30])
def test_values_without_gradients_are_those_with(kernel_class: type, budget: int) -> None:
    for module, shape in ((relu_network(), (4,)), (pooled(), (2, 5, 5))):
        x = torch.randn(7, math.prod(shape), dtype=D)
        z = torch.cat([torch.randn(3, math.prod(shape), dtype=D), x[2:4], -x[:1]])
        whole = kernel_class(module, input_shape=shape).double()
        small = kernel_class(module, input_shape=shape, memory_budget=budget).double()
        for one, two in ((x, x), (x, z), (z, z)):
            expected = whole(one, two).to_dense()
            assert expected.requires_grad
            with torch.no_grad():
                value = small(one, two).to_dense()
                torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-13)
                torch.testing.assert_close(small(one[:6], two[:6], diag=True), value[:6, :6].diagonal())


@pytest.mark.parametrize("kernel_class", KERNELS)
def test_equal_inputs_are_exact_in_every_block(kernel_class: type) -> None:
    x = torch.randn(9, 50)
    x = torch.cat([x, x[:4]])
    kernel = kernel_class(pooled(), input_shape=(2, 5, 5), memory_budget=2**15, learn=False)
    diagonal = kernel(x, diag=True)
    k = kernel(x).to_dense()
    torch.testing.assert_close(k.diagonal(), diagonal, rtol=1e-6, atol=0)
    torch.testing.assert_close(k[9:, :4].diagonal(), diagonal[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(kernel(x[:3], x[9:12]).to_dense().diagonal(), diagonal[:3], rtol=1e-6, atol=0)


def test_gradients_of_equal_inputs_are_shared_by_both() -> None:
    # k(x, x') is symmetric: where x = x', either has half of the derivative of k(x, x).
    kernel = gpntk.InfiniteNTKKernel(relu_network(), learn=False).double()
    x, z = (torch.tensor([[0.3, -1.0, 0.7, 2.0]], dtype=D, requires_grad=True) for _ in range(2))
    own = torch.autograd.grad(kernel(x, diag=True).sum(), x)[0]
    cross = torch.autograd.grad(kernel(x, z).to_dense().sum(), (x, z))
    # Equal rows of one tensor.
    both = torch.cat([x, z])
    entry = torch.autograd.grad(kernel(both).to_dense()[0, 1], (x, z))
    for gradient in (*cross, *entry):
        torch.testing.assert_close(gradient, own / 2)


def test_dropout_in_train_mode_grows_only_what_is_equal() -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1)).train()
    x = torch.randn(4, 4, dtype=D)
    kernels = [gpntk.InfiniteNNGPKernel(m, 1.0, 0.0).double() for m in (module, module[:2].append(module[3]))]
    dropped, plain = (kernel(x, torch.cat([x[:2], x[:2] + 1])).to_dense().detach() for kernel in kernels)
    plain[0, 0], plain[1, 1] = plain[0, 0] / 0.8, plain[1, 1] / 0.8
    torch.testing.assert_close(dropped, plain)
    torch.testing.assert_close(kernels[0](x, diag=True), kernels[1](x, diag=True) / 0.8)


def test_only_what_is_asked_for_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A symmetric matrix: pairs from the diagonal on; the diagonal's blocks whole.
    counted: list[int] = []
    plain = AbstractActivation.moments

    def counting(self: AbstractActivation, q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        counted.append(k.numel())
        return plain(self, q1, q2, k)

    monkeypatch.setattr(AbstractActivation, "moments", counting)
    monkeypatch.setattr("gpntk.infinite.infinite_kernels._IN_CACHE", {False: 16})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        kernel = gpntk.InfiniteNNGPKernel(relu_network(depth=1), learn=False)
        kernel(torch.randn(40, 4)).to_dense()
    finally:
        torch.set_num_threads(threads)
    assert sum(counted) == 4 * 4 * (10 * 11 // 2)
    counted.clear()
    kernel(torch.randn(40, 4), diag=True)
    assert sum(counted) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, D])
@pytest.mark.parametrize("collide", [False, True])
def test_equal_rows_are_found(dtype: torch.dtype, collide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if collide:  # where all keys are the same, rows are compared in full
        monkeypatch.setattr("gpntk.infinite.recursion._keys", lambda rows: torch.zeros(len(rows)))
    x = torch.randint(-1, 2, (60, 3)).to(dtype) * torch.tensor([-0.0, 1.0, 2.0], dtype=dtype)
    z = torch.cat([x[5:9], -x[:20], torch.full((2, 3), torch.inf, dtype=dtype)])
    for one, two in ((x, x), (x, z), (z, x)):
        pairs, found = (one.unsqueeze(1) == two).all(-1), torch.zeros(len(one), len(two), dtype=torch.bool)
        equal = equal_pairs(*row_numbers(one, two))
        assert isinstance(equal, tuple)
        found[equal] = True
        assert torch.equal(found, pairs)
    many = torch.randn(6, 2000).to(dtype)
    many[4, 1:] = many[1, 1:]  # differ in one column of many
    many[5] = many[2]
    wanted = (many.unsqueeze(1) == many).all(-1)
    found = equal_pairs(*row_numbers(many, many))
    assert isinstance(found, tuple)
    assert torch.equal(torch.stack(found), wanted.nonzero().T)


@pytest.mark.parametrize("repeated", [False, True])
def test_equal_rows_block_by_block(repeated: bool) -> None:
    x = torch.randn(10, 3)
    if repeated:
        x[7] = x[2]
    (one, two), found = row_numbers(x, x), torch.zeros(10, 10, dtype=torch.bool)
    assert equal_pairs(one[:2], two[3:7]) is False
    for i, j in itertools.product((slice(0, 4), slice(4, 10)), (slice(0, 3), slice(3, 10))):
        pairs = equal_pairs(one[i], two[j])
        if pairs is not False:
            found[i, j][pairs] = True
    assert torch.equal(found, (x.unsqueeze(1) == x).all(-1))


# --- moments --------------------------------------------------------------------------------------------------------


def test_moments_by_parts_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 6, 7, 3)
    k = torch.einsum("nhwc,nijc->nhiwj", x, x) / 3
    q = x.square().mean(-1)
    q1, q2 = q[:, :, None, :, None], q[:, None, :, None, :]
    whole = ABReLU(-0.3, 1.0).moments(q1, q2, k)
    monkeypatch.setattr("gpntk.infinite.gaussian._CACHED", 40)
    for part, value in zip(ABReLU(-0.3, 1.0).moments(q1, q2, k), whole, strict=True):
        assert torch.equal(part, value)


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_determinant_does_not_cancel(dtype: torch.dtype) -> None:
    # Exact in integers: q1 q2 - k² of numbers that float32, or only float64, can hold.
    bits = 22 if dtype == torch.float32 else 50
    a, b = 2**bits + 3, 2**bits + 9
    k = math.isqrt(a * b)
    value = determinant(*(torch.tensor([float(n)], dtype=dtype).double() for n in (a, b, k)))
    assert value.item() == pytest.approx(a * b - k * k, rel=1e-12)


def test_equal_inputs_cost_a_quadrature_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # Their correlation is one, where series are slow: the exact moments of one variable take their place.
    def refuse(*_: object) -> Tensor:
        raise AssertionError("equal inputs are not nearly parallel ones")

    monkeypatch.setattr("gpntk.infinite.near_parallel.NearParallel.moments", refuse)
    module = nn.Sequential(nn.Linear(6, 8), nn.Hardtanh(), nn.Linear(8, 1))
    kernel = gpntk.InfiniteNTKKernel(module, 1.0, 0.0, learn=False).double()
    x = torch.eye(6, dtype=D)
    k = kernel(x).to_dense()
    first, second = Quadrature(functional.hardtanh, (-1.0, 1.0)).diagonal(torch.full((6,), 1 / 6, dtype=D))
    torch.testing.assert_close(k.diagonal(), first + second / 6)


def nearly_parallel(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q1, q2 = (0.9 + 0.2 * torch.rand(2, count, generator=generator, dtype=D)).unbind()
    angle = 0.05 * torch.rand(count, generator=generator, dtype=D)
    return q1, q2, (q1 * q2).sqrt() * angle.cos()


def test_tables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(near_parallel, "_tables", [])
    monkeypatch.setattr(near_parallel, "_KEPT", 3)
    make = near_parallel.Table.of

    def counting(direct: Callable[..., Tensor], box: Any, sizes: tuple[int, int], device: torch.device) -> Any:
        made.append(sizes)
        return make(direct, box, sizes, device)

    monkeypatch.setattr(near_parallel.Table, "of", counting)
    factor = [1.0]
    elu = Quadrature(lambda x: factor[0] * functional.elu(x), (0.0,))
    exact = Quadrature(functional.elu, (0.0,))
    entries = nearly_parallel(1000)
    first = elu.moments(*entries)
    built = len(made)
    assert built
    # Other entries in the same box, also fewer than a table would be made for.
    for count, seed in ((1000, 1), (100, 2)):
        others = nearly_parallel(count, seed)
        for value, direct in zip(elu.moments(*others), direct_moments(functional.elu, *others), strict=True):
            torch.testing.assert_close(value, direct, rtol=1e-10, atol=0)
    assert len(made) == built
    # What a function made of it is told from what it makes now.
    factor[0] = 2.0
    for value, before in zip(elu.moments(*entries), first, strict=True):
        torch.testing.assert_close(value, 4 * before, rtol=1e-9, atol=0)
    # Each function has its own.
    for value, before in zip(exact.moments(*entries), first, strict=True):
        torch.testing.assert_close(value, before, rtol=1e-9, atol=0)
    assert len(made) > built
    assert len(near_parallel._tables) <= 3


def direct_moments(phi: Callable[[Tensor], Tensor], q1: Tensor, q2: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    rule = near_parallel.NearParallel(Elementwise(phi), (0.0,), 1e-10, (phi,))
    return rule.direct(q1, q2, k).unbind(-1)


def test_kept_tables_do_not_disturb_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are computed again must take the path that they took before, whatever tables there are by then."""
    monkeypatch.setattr(near_parallel, "_tables", [])
    elu = Quadrature(functional.elu, (0.0,))
    elu.moments(*nearly_parallel(1000))
    assert near_parallel._tables

    def refuse(*_: object) -> Tensor:
        raise AssertionError("a kept table is used")

    monkeypatch.setattr(near_parallel.Table, "__call__", refuse)
    entries = nearly_parallel(100, 1)
    with pytest.raises(AssertionError, match="is used"):
        elu.moments(*entries)
    k = entries[2].clone().requires_grad_()
    first, second = elu.moments(*entries[:2], k)
    torch.testing.assert_close(*torch.autograd.grad(first.sum(), k), second, rtol=1e-12, atol=0)
