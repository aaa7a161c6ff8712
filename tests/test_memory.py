"""Budgets, chunks, and the point at which a cheaper strategy takes over."""

import itertools
import math
import os
import signal
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpntk
from gpntk import cost, jacobians, memory
from gpntk.errors import InputError
from gpntk.jacobians.record import row_values
from gpntk.jacobians.uses import find_uses
from gpntk.operators.batching import batch_product
from tests.cases import mlp, reference_jacobian


class Largest(TorchDispatchMode):
    """The sizes of the tensors that operations allocate, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, Tensor)}
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_temporary_of_the_size_of_the_parameters() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(300, 300) for _ in range(10)), nn.Linear(300, 1))
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    x, v = torch.randn(1, 3, 300), torch.randn(1, 1, backend.num_features)
    backend.check(x)
    with Largest() as vjp:
        backend.vjp(x, torch.randn(1, 1, 3))
    assert sum(size >= backend.num_features for size in vjp.sizes) == 1  # the result
    assert sorted(vjp.sizes)[-2] <= 300**2
    with Largest() as jvp:
        backend.jvp(x, v)
    assert max(jvp.sizes) <= 300**2


@pytest.mark.parametrize("budget", [2**18, 2**20])
def test_products_of_a_convolutional_network_stay_within_the_budget(budget: int) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module, input_shape=(1, 8, 8)), budget)
    x, u = torch.randn(1, 400, 64), torch.randn(1, 2, 1200)
    v = backend.vjp(x, u)
    own = 4 * max(x.numel(), u.numel())
    for product in (lambda: backend.vjp(x, u), lambda: backend.jvp(x, v), lambda: backend.diagonal(x)):
        with Largest() as seen:
            product()
        assert 4 * max(seen.sizes) <= max(budget, own)


def test_running_out_of_memory_halves_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, limit = mlp(2).double(), 3
    x = torch.randn(1, 13, 5, dtype=torch.float64)
    j = reference_jacobian(module.eval(), x[0])
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    backend.check(x)
    assert backend._capture is not None
    parts = backend._capture.parts

    def limited(rows: Tensor):
        if rows.shape[1] > limit:
            raise torch.OutOfMemoryError("as a device would")
        return parts(rows)

    monkeypatch.setattr(backend._capture, "parts", limited)
    u = torch.randn(1, 2, 26, dtype=torch.float64)
    with pytest.warns(UserWarning, match="out of memory on 13 items at once: going on with half as many") as caught:
        torch.testing.assert_close(backend.vjp(x, u)[0], u[0] @ j)
    assert len(caught) == 1
    limit = 0
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(torch.OutOfMemoryError):
        backend.vjp(x + 1, u)


def test_halving_leaves_other_errors_alone() -> None:
    def fail(_items: slice) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        memory.halving(slice(0, 8), fail)
    with pytest.warns(UserWarning, match="out of memory"):
        sizes = memory.halving(slice(0, 8), lambda items: _allocate(items.stop - items.start))
    assert sizes == [2, 2, 2, 2]


def test_a_budget_must_be_positive() -> None:
    for budget in (0, -1):
        for make in (
            jacobians.AutoBackend,
            jacobians.StructuredBackend,
            jacobians.DenseBackend,
            jacobians.AutodiffBackend,
        ):
            with pytest.raises(InputError, match=f"memory_budget={budget}: must be a positive number of bytes"):
                make(gpntk.freeze(nn.Linear(2, 1)), memory_budget=budget)


def test_the_default_budget_does_not_depend_on_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    before = memory.default_budget(torch.device("cpu"))
    taken = torch.ones(2**26)  # a quarter of a gigabyte
    assert memory.default_budget(torch.device("cpu")) == before
    assert before == int(0.25 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    assert taken.numel()


def test_passing_may_be_nested() -> None:
    cache, x, made = memory.TensorCache(10**6), torch.ones(3), []

    def compute() -> Tensor:
        made.append(None)
        return x + 1

    with memory.passing(x):
        with memory.passing(x[:2]):
            cache.get("one", (x,), compute)
        cache.get("one", (x,), compute)
    assert not cache.holds("one", (x,))
    cache.get("one", (x,), compute)
    cache.get("one", (x,), compute)
    assert len(made) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_does_not_wait_for_a_thread_it_has_not() -> None:
    held, done = threading.Event(), threading.Event()

    class Slow(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is not threading.main_thread():
                held.set()
                done.wait(30)
            return super().forward(x)

    network = gpntk.freeze(Slow(2, 1))
    thread = threading.Thread(target=network, args=(torch.ones(1, 2),))
    thread.start()
    assert held.wait(30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # that a process with threads is forked: the point
        child = os.fork()
    if not child:
        signal.alarm(20)
        network(torch.ones(1, 2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    done.set()
    thread.join()


def test_machines_are_told_by_their_names() -> None:
    assert cost.Machine.of("cpu") == cost.Machine()
    assert cost.gpu("NVIDIA H200", 132).flops > 100 * cost.Machine().flops
    assert cost.gpu("NVIDIA A100-SXM4-80GB", 108).bandwidth == 1.9e12
    unknown = cost.gpu("NVIDIA RTX A1000", 16)
    assert 1e12 < unknown.flops < 1e13


def _allocate(size: int) -> int:
    if size > 2:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")
    return size


def count_passes(backend: gpntk.jacobians.StructuredBackend, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    assert backend._capture is not None
    parts = backend._capture.parts
    monkeypatch.setattr(backend._capture, "parts", lambda x: made.append(x.shape[1]) or parts(x))
    return made


@pytest.mark.parametrize(("outputs", "rows", "passes"), [(4, 64, False), (200, 4, True)])
def test_very_many_outputs_take_a_pass_per_column(
    outputs: int, rows: int, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, outputs)).double()
    x = torch.randn(1, rows, 3, dtype=torch.float64)
    j = reference_jacobian(module, x[0])
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module))
    backend.check(x)
    made = count_passes(backend, monkeypatch)
    # What counts for a large x counts here, if calls cost nothing.
    monkeypatch.setattr(cost.Machine, "of", lambda _device: cost.Machine(calls=1e12))
    u, v = torch.randn(1, 1, rows * outputs, dtype=torch.float64), torch.randn(1, 1, j.shape[1], dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(backend.vjp(x, u)[0], u[0] @ j)
        torch.testing.assert_close(backend.jvp(x, v)[0], v[0] @ j.T)
        assert bool(made) != passes


def test_a_readout_takes_no_backward_pass_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 50)).double()
    backend = gpntk.jacobians.StructuredBackend(gpntk.freeze(module, "readout"))
    x = torch.randn(1, 4, 3, dtype=torch.float64)
    j = reference_jacobian(module, x[0], ["2.weight", "2.bias"])
    backend.check(x)
    monkeypatch.setattr(torch.autograd, "grad", None)
    u = torch.randn(1, 1, 200, dtype=torch.float64)
    torch.testing.assert_close(backend.vjp(x, u)[0], u[0] @ j)
    torch.testing.assert_close(backend.gram(x, x)[0, 0], j @ j.T)
    torch.testing.assert_close(backend.diagonal(x)[0, 0], j.square().sum(-1))


def test_products_go_by_the_gram_where_twenty_of_them_cost_more() -> None:
    module = nn.Sequential(nn.Linear(20, 300), nn.Tanh(), nn.Linear(300, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    kernel = gpntk.NTKKernel(module, layer_variances=True, backend=gpntk.jacobians.StructuredBackend)
    kernel.layer_variances = torch.tensor([[0.5], [2.0], [1.0]])
    x, v = torch.randn(1500, 20, dtype=torch.float64), torch.randn(1500, 1, dtype=torch.float64)
    few = kernel(x[:600]).evaluate_kernel()
    lazily = batch_product(few._backend.vjp, x[:600], v[:600].mT)
    scaled = lazily * few._feature_variances.unsqueeze(-2)
    torch.testing.assert_close(few @ v[:600], batch_product(few._backend.jvp, x[:600], scaled).mT)
    assert few._by_gram(1)
    assert not kernel(torch.randn(60_000, 20).double()).evaluate_kernel()._by_gram(1)
    # Hyperparameters still learn through it.
    loss = (v.mT @ (kernel(x).evaluate_kernel() @ v)).trace()
    (gradient,) = torch.autograd.grad(loss, kernel.raw_layer_variances)
    dense = (v.mT @ (kernel(x).to_dense() @ v)).trace()
    torch.testing.assert_close(gradient, torch.autograd.grad(dense, kernel.raw_layer_variances)[0])


def test_costs_are_counted() -> None:
    widths = (784, 512, 512, 1)
    layers = [nn.Linear(i, o) for i, o in itertools.pairwise(widths)]
    network = gpntk.freeze(nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2]))
    x = torch.randn(1, 100, 784)
    choice = gpntk.AutoBackend.select(network, x)
    costs = {cost.strategy: cost for cost in choice.costs}
    weights = sum(i * o for i, o in itertools.pairwise(widths))
    assert math.isclose(costs["factors, kept"].product.flops, 4 * 100 * weights * 10, rel_tol=0.01)
    assert costs["dense Jacobian"].kept == 4 * 100 * network.num_params
    assert "factors, kept" in str(choice)
    assert str(choice).startswith("StructuredBackend: every selected parameter")
    tight = gpntk.AutoBackend.select(network, x, memory_budget=10_000)
    fits = {cost.strategy: cost.fits for cost in tight.costs}
    assert not fits["Gram"]
    assert not fits["dense Jacobian"]
    assert fits["autodiff"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_of_a_pass_are_those_it_makes_and_not_its_weights(dtype: torch.dtype) -> None:
    """Chunks of rows are as long as these counts let them be: weights counted as well made passes five times slower."""
    network = gpntk.freeze(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 2)))
    x = torch.randn(5, 3, dtype=dtype)
    uses = find_uses(network, x)
    made = 3 + 50 + 50 + 2  # a copy of x, a linear layer, tanh, a linear layer
    assert (uses.activations, uses.largest, uses.tensors) == (made, 50, 4)
    assert row_values(network, x[:1]) == made


def test_halves_say_once_that_memory_is_out_and_all_else_as_it_is() -> None:
    def compute(items: slice) -> int:
        if items.stop - items.start > 2:
            raise torch.OutOfMemoryError
        warnings.warn("of the product itself", stacklevel=1)
        return items.stop - items.start

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert memory.halving(slice(0, 8), compute) == [2, 2, 2, 2]
    said = [str(warning.message) for warning in caught]
    assert sum("out of memory on" in message for message in said) == 1
    assert said.count("of the product itself") == 4
