"""FrozenNetwork: what it computes, what it leaves alone, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.errors import InputError, NetworkError, SelectionError
from tests.cases import CASES, Case, Twice, mlp


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_same_function_as_the_module(case: Case) -> None:
    module, x = case.module(), case.x(5)
    expected = module(x.view(-1, *case.input_shape)).detach()
    frozen = gpntk.freeze(module, input_shape=case.input_shape)
    torch.testing.assert_close(frozen(x), expected.view(5, -1), rtol=1e-12, atol=1e-13)
    assert frozen.num_outputs(x) == expected.view(5, -1).shape[1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_round_trip(case: Case) -> None:
    frozen = gpntk.freeze(case.module())
    vector = torch.randn(2, frozen.num_params)
    assert frozen.num_params == sum(p.numel() for p in case.module().parameters())
    torch.testing.assert_close(frozen.flatten(frozen.unflatten(vector), batch_dims=1), vector)
    stops = [columns.stop for _, columns in frozen.layers]
    assert stops == sorted(stops)
    assert stops[-1] == frozen.num_params


def test_later_training_of_the_module_changes_nothing() -> None:
    module, x = mlp(2).eval(), torch.randn(3, 5)
    frozen = gpntk.freeze(module)
    before = frozen(x)
    with torch.no_grad():
        module[0].weight.mul_(3)
    torch.testing.assert_close(frozen(x), before, rtol=0, atol=0)


def test_the_module_is_left_alone() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 1)).eval()
    module[0].weight.requires_grad_(False)
    module(torch.randn(3, 4)).sum().backward()
    state = copy.deepcopy(module.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in module.parameters()]
    kernel = gpntk.NTKKernel(module)
    x = torch.randn(6, 4, requires_grad=True)
    kernel.train()
    kernel(x).to_dense().sum().backward()
    (kernel(x).evaluate_kernel() @ torch.ones(6, 2)).sum().backward()
    kernel.double()
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        if gradient is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)
    assert not any(child.training for child in module.modules())
    assert [p.requires_grad for p in module.parameters()] == [False, True, True, True, True, True]
    assert not any(child._forward_hooks for child in module.modules())


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (None, ["0.weight", "0.bias", "2.weight", "2.bias", "5.weight", "5.bias"]),
        ("0.*", ["0.weight", "0.bias"]),
        (["*.bias", "5.*"], ["0.bias", "2.bias", "5.weight", "5.bias"]),
        ("readout", ["5.weight", "5.bias"]),
        (lambda name, parameter: parameter.dim() == 2, ["0.weight", "2.weight", "5.weight"]),
    ],
)
def test_parameter_selection(selection, names: list[str]) -> None:
    assert list(gpntk.freeze(mlp(2).eval(), selection).names) == names


def test_copies_share_weights_and_move_apart() -> None:
    frozen = gpntk.freeze(mlp(1).eval())
    twin = copy.deepcopy(frozen)
    assert twin.frozen_0.data_ptr() == frozen.frozen_0.data_ptr()
    twin.double()
    assert (twin.dtype, frozen.dtype) == (torch.float64, torch.float32)


def test_views_of_one_output_follow_the_network() -> None:
    frozen = gpntk.freeze(mlp(3).eval())
    view = frozen.select_output(1)
    x = torch.randn(4, 5)
    torch.testing.assert_close(view(x)[:, 0], frozen(x)[:, 1])
    torch.testing.assert_close(frozen.select_output("sum")(x)[:, 0], frozen(x).sum(-1) / 3**0.5)
    frozen.double()
    assert view.dtype == torch.float64


def test_pickle_round_trip() -> None:
    frozen = gpntk.freeze(mlp(2).eval(), "0.*")
    x = torch.randn(3, 5)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x), frozen(x), rtol=0, atol=0)


def test_no_weights_among_parameters_or_state() -> None:
    kernel = gpntk.NTKKernel(mlp(2).eval())
    assert not list(kernel.network.parameters())
    assert not kernel.network.state_dict()


def test_train_leaves_the_frozen_mode_alone() -> None:
    kernel, x = gpntk.NTKKernel(mlp(2).eval()), torch.randn(3, 5)
    before = kernel.network(x)
    kernel.train()
    assert not kernel.network._skeleton.module.get_submodule("4").training  # the dropout layer
    torch.testing.assert_close(kernel.network(x), before, rtol=0, atol=0)


class Dictionary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def logits(out: dict[str, Tensor]) -> Tensor:
    return out["logits"]


def test_extract() -> None:
    x = torch.randn(4, 3)
    module = Dictionary()
    frozen = gpntk.freeze(module, extract=logits)
    assert frozen(x).shape == (4, 2)
    assert gpntk.NTKKernel(frozen)(x).to_dense().shape == (8, 8)
    guessed = gpntk.freeze(module)
    torch.testing.assert_close(guessed(x), frozen(x))
    assert "'logits'" in repr(guessed)


# --- refusals ------------------------------------------------------------------------------------------------------


def nan_weights() -> nn.Module:
    module = nn.Linear(2, 1)
    with torch.no_grad():
        module.weight[0, 0] = float("nan")
    return module


def integer_weights() -> nn.Module:
    module = nn.Linear(2, 1)
    module.scale = nn.Parameter(torch.tensor([2]), requires_grad=False)
    return module


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Dropout()), r"'1' \(Dropout\) is in train mode.*module.eval\(\)"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), r"'1' \(BatchNorm1d\) is in train mode"),
        (lambda: nn.BatchNorm1d(2, track_running_stats=False).eval(), "keeps no running statistics"),
        (nan_weights, "'weight' contains NaN or infinite values"),
        (integer_weights, "'scale' has dtype torch.int64"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()), "several dtypes"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), "several devices"),
        (nn.ReLU, "has no parameters"),
        (lambda: nn.LazyLinear(3), "not initialised yet"),
        (lambda: lambda x: x, "must be a torch.nn.Module, got function"),
    ],
)
def test_networks_that_cannot_be_frozen(build, message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        gpntk.freeze(build())


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ("head.*", r"'head.\*' matches none of the network's parameters: 0.weight"),
        (["0.*", "head.*"], r"'head.\*' matches none"),
        (lambda name, parameter: False, "selected none of the network's parameters"),
        ([], "selects nothing"),
    ],
)
def test_selections_that_match_nothing(selection, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        gpntk.freeze(mlp(1).eval(), selection)


class Centered(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - x.mean()


class Noisy(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand(1)


class Grid(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, None, None]


class Infinite(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 0


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (Centered, NetworkError, "depends on the other rows of the batch"),
        (Noisy, NetworkError, "it is stochastic"),
        (Grid, NetworkError, r"returned shape \(2, 1, 1, 1\) for 2 rows; gpntk needs \[N\] or \[N, C\]"),
        (Infinite, InputError, "returns NaN or infinite values"),
    ],
)
def test_behaviour_found_by_the_probe(build, error: type, message: str, rows: int) -> None:
    with pytest.raises(error, match=message):
        gpntk.NTKKernel(build(3, 1))(torch.randn(rows, 3)).to_dense()


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(4, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def test_readout_must_be_the_last_layer_to_run() -> None:
    with pytest.raises(SelectionError, match=r"runs 'head' last: pass parameters='head.\*'"):
        gpntk.NNGPKernel(HeadFirst())(torch.randn(3, 3)).to_dense()
    assert gpntk.NTKKernel(HeadFirst(), parameters="head.*")(torch.randn(3, 3)).to_dense().shape == (3, 3)


def test_shapes_that_do_not_fit_input_shape() -> None:
    with pytest.raises(InputError, match=r"x has 5 values per row, but input_shape=\(4, 4\) needs 16"):
        gpntk.freeze(Twice(), input_shape=(4, 4))(torch.randn(2, 5))


def test_empty_input() -> None:
    with pytest.raises(InputError, match="x is empty"):
        gpntk.freeze(mlp(1).eval()).num_outputs(torch.randn(0, 5))


def test_a_network_without_values() -> None:
    with torch.device("meta"):
        module = nn.Linear(3, 2)
    with pytest.raises(NetworkError, match="meta device, which hold no values"):
        gpntk.freeze(module)
