"""What stands between the readout and all parameters where these are too many: which, what they are, and when."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpntk
from gpntk.transfer import TransferGP
from gpntk.transfer.candidates import ALL, NORMS, RANDOM, RANDOM_FEATURES, SUM, Candidate, Moves
from gpntk.transfer.report import report_on

X = torch.randn(12, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.one, self.two = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(torch.tanh(self.one(self.norm(x))))


class Encoder(nn.Module):
    def __init__(self, outputs: int, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))))


def encoder(outputs: int = 1) -> nn.Module:
    torch.manual_seed(1)
    return Encoder(outputs).double()


def moves_of(network: gpntk.FrozenNetwork, outputs: int = 1, **options) -> Moves:
    given = {"new_head": False, "plain": True, "time_budget": 1.0, "newton_flops": 0.0, **options}
    return Moves(network, X, outputs=outputs, **given)


def test_blocks_are_what_paths_number() -> None:
    network = gpntk.freeze(encoder())
    moves = moves_of(network)
    assert moves.between == ["last block", "last 2 blocks", NORMS, RANDOM]
    assert set(moves.parameters("last block")) == {
        name for name in network.names if name.startswith(("blocks.2.", "norm.", "head."))
    }
    assert set(moves.parameters("last 2 blocks")) - set(moves.parameters("last block")) == {
        name for name in network.names if name.startswith("blocks.1.")
    }
    assert set(moves.parameters(NORMS)) == {n for n in network.names if "norm" in n or n.endswith("bias")}
    assert moves.parameters(ALL) == moves.parameters(RANDOM) == list(network.names)
    # Of a plain stack, layers; random features have one variance; sums are for many outputs under their own head.
    stack = gpntk.freeze(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    )
    assert moves_of(stack, 3, plain=False).between == ["last block", NORMS, SUM]
    assert moves_of(stack, 3).parameters("last block") == ["2.weight", "2.bias", "4.weight", "4.bias"]
    assert SUM not in moves_of(stack, 8, new_head=True).between
    # A selection of the user's is kept to.
    assert moves_of(gpntk.freeze(encoder(), "blocks.*.one.weight")).between == ["last block", "last 2 blocks"]


def jacobian(module: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """J `[N, C, P]` of some parameters, by plain backward passes."""
    chosen = [parameter for name, parameter in module.named_parameters() if name in names]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(output, chosen, retain_graph=True)])
        for output in module(x).flatten()
    ]
    return torch.stack(rows).unflatten(0, (len(x), -1))


@pytest.mark.parametrize("moves", ["last block", "last 2 blocks", NORMS, SUM])
def test_a_candidate_has_the_tangent_kernel_of_its_parameters(moves: str) -> None:
    module = encoder(3)
    y = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gp = TransferGP(gpntk.freeze(module), X, y, mean="zero")
    prior = gp._builder.build(Candidate("ntk", moves=moves))
    found = prior.matrix(torch.zeros(1, dtype=torch.float64), X, X)
    j = jacobian(module, X, gp._builder.moves.parameters(moves)) / gp.task.units[:, None]
    j = j.sum(1) if moves == SUM else j.flatten(0, 1)
    wanted = j @ j.T
    assert torch.allclose(found, wanted / wanted.diagonal().mean(), atol=1e-11)
    assert prior.shared == (moves == SUM)


def test_random_features_say_how_far_off_they_are() -> None:
    module = encoder()
    j = jacobian(module, X, [name for name, _ in module.named_parameters()])[:, 0]
    exact = j @ j.T
    for features in (64, 1024):
        errors, estimates = [], []
        for seed in range(10):
            kernel = gpntk.SketchedNTKKernel(module, num_features=features, seed=seed)
            found = kernel.features(X).to_dense() @ kernel.features(X).to_dense().T
            errors.append(float((found - exact).norm() / found.norm()))
            estimates.append(kernel.error(X))
        # Root mean squares of ten each: they agree but for chance.
        error, estimate = (np.sqrt(np.mean(np.square(values))) for values in (errors, estimates))
        assert 0.6 < estimate / error < 1.6
    several = gpntk.SketchedNTKKernel(encoder(3), num_features=256, output="independent")
    assert 0.01 < several.error(X) < 0.3


def wiggly() -> nn.Module:
    """Most parameters are below the last hidden layer, `4`."""
    torch.manual_seed(3)
    layers = [nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
    network = nn.Sequential(*layers).double()
    with torch.no_grad():
        network[0].weight.mul_(4)
        network[2].weight.mul_(4)
    return network


def moved(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """Targets that a move of the last hidden layer makes."""
    module = wiggly()
    x = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    j = jacobian(module, x, ["4.weight", "4.bias"])[:, 0]
    y = j @ torch.randn(j.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return module, x, (y / y.std()).unsqueeze(-1)


def between(x: Tensor, y: Tensor, module: nn.Module) -> float:
    """A time budget that the last block keeps to and all parameters do not."""
    moves = TransferGP(gpntk.freeze(module), x, y)._builder.moves
    assert moves.seconds("last block") < moves.seconds(ALL) / 2
    return (moves.seconds("last block") * moves.seconds(ALL)) ** 0.5


def test_the_last_block_is_found_where_the_readout_fails(tmp_path, caplog: pytest.LogCaptureFixture) -> None:
    module, x, y = moved(300)
    (x, new), (y, truth) = x.split(150), y.split(150)
    budget = between(x, y, module)
    options = {"mean": "zero", "hyperparameters": "maximum", "time_budget": budget}
    with caplog.at_level("WARNING", "gpntk.transfer"):
        model = gpntk.TransferRegressor(module, **options).fit(x.numpy(), y[:, 0].numpy())
    assert "last block" in model.kernel_
    assert "kernel='ntk+stationary' would take about" in caplog.text

    def error(fitted) -> float:
        return float(np.sqrt(np.mean((fitted.predict(new.numpy()) - truth[:, 0].numpy()) ** 2)))

    others = [
        error(gpntk.TransferRegressor(module, kernel=kernel, stationary_inputs=kind, **options).fit(x, y[:, 0]))
        for kernel, kind in (("nngp", None), ("stationary", "inputs"), ("stationary", "features"))
    ]
    assert error(model) < 0.1 * min(others)
    # All that was compared is listed, with its evidence and its seconds; so is what was left out.
    report = model.report_
    assert (
        set(report.compared.log_evidence)
        == set(report.compared.seconds)
        >= {
            "stationary of features",
            "ntk+stationary, last block",
            "ntk+stationary of features, last block",
            "nngp",
            "stationary",
        }
    )
    assert all(seconds > 0 for seconds in report.compared.seconds.values())
    best = max(report.compared.log_evidence, key=report.compared.log_evidence.__getitem__)
    assert best == model.kernel_
    assert f"compared, {best}" in str(report)
    moves = model._model._builder.moves
    for left in moves.between:
        in_words = f"With {left}: about" in " ".join(report.notes)
        assert in_words == (moves.seconds(left) > budget)
    model.save(tmp_path / "model.safetensors")
    again = gpntk.TransferRegressor.load(tmp_path / "model.safetensors", module)
    assert again.kernel_ == model.kernel_
    assert abs(again.predict(new.numpy()) - model.predict(new.numpy())).max() < 1e-9


@pytest.mark.parametrize(("labels", "new_head"), [("targets", True), ("classes", False)])
def test_every_candidate_fits_by_every_likelihood(labels: str, new_head: bool, monkeypatch) -> None:
    """With all of them affordable but the tangent kernel of all parameters."""
    module = encoder(3)
    affords = Moves.affords
    monkeypatch.setattr(Moves, "affords", lambda self, moves: moves != ALL and affords(self, moves))
    generator = torch.Generator().manual_seed(6)
    y = torch.randn(12, 3, dtype=torch.float64, generator=generator) if labels == "targets" else torch.arange(12) % 3
    likelihood = "gaussian" if labels == "targets" else "dirichlet" if new_head else "categorical"
    gp = TransferGP(gpntk.freeze(module), X, y, likelihood=likelihood, new_head=new_head, stationary_inputs="features")
    gp.fit()
    sums = {moves for moves in ("last block", "last 2 blocks", NORMS, RANDOM, *([] if new_head else [SUM]))}
    assert {name.partition(", ")[2] for name in gp.comparison.log_evidence} == {"", *sums}
    assert all(np.isfinite(value) for value in gp.comparison.log_evidence.values())
    notes = " ".join(report_on(gp).notes)
    assert f"{RANDOM_FEATURES} random features" in notes


def test_where_all_parameters_are_affordable_nothing_else_is_tried() -> None:
    module, x, y = moved(40)
    gp = TransferGP(gpntk.freeze(module), x, y)
    assert {candidate.moves for candidate in gp._builder.candidates()} == {ALL}
    assert gp._builder.left_out is None


def test_without_a_readout_other_moves_stand_for_all() -> None:
    """They are no weaker in silence: without any of them, all parameters are taken whatever they cost."""
    module, x, y = moved(40)
    body = gpntk.freeze(module, lambda name, _: not name.startswith("6"))
    budget = between(x, y, module)
    gp = TransferGP(body, x, y, time_budget=budget)
    found = {candidate.moves for candidate in gp._builder.candidates() if "ntk" in candidate.kernel}
    assert "last block" in found
    assert ALL not in found
    assert gp._builder.left_out is not None
    gp = TransferGP(body, x, y, time_budget=1e-12)
    assert {candidate.moves for candidate in gp._builder.candidates()} == {ALL}
