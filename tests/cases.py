"""Networks as data: (module, input shape), each with a reference Jacobian that shares no code with gpntk."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import functional_call


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    input_shape: tuple[int, ...]
    structured: bool
    """Whether every parameter belongs to a layer with a structured rule."""

    def module(self) -> nn.Module:
        torch.manual_seed(7)
        return self.build().double().eval()

    def x(self, rows: int) -> Tensor:
        """Flat inputs `[rows, D]`."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, *self.input_shape, dtype=torch.float64, generator=generator).flatten(1)


def scale_and_noise(scale: float, noise: float) -> dict[str, Tensor]:
    """Hyperparameters of a `TangentGP` by name, for ``initialize``, which rounds Python's numbers to float32."""
    values = torch.tensor([scale, noise], dtype=torch.float64)
    return {"covar_module.outputscale": values[0], "likelihood.noise": values[1]}


def reference_jacobian(module: nn.Module, x: Tensor, names: list[str] | None = None) -> Tensor:
    """J `[N*C, P]` over the named parameters, row by row with plain autograd, for x `[N, *input_shape]`."""
    every = {name: parameter.detach() for name, parameter in module.named_parameters()}
    names = list(every) if names is None else names

    def outputs(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(module, {**every, **parameters}, (row.unsqueeze(0),)).flatten()

    rows = []
    for row in x:
        blocks = jacobian(
            lambda *p, row=row: outputs(dict(zip(names, p, strict=True)), row), tuple(map(every.get, names))
        )
        rows.append(torch.cat([block.flatten(1) if block.dim() > 1 else block[:, None] for block in blocks], dim=-1))
    return torch.cat(rows)


class Tokens(nn.Module):
    """A Linear shared over positions, then pooled."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(3, 9), nn.Linear(9, 5, bias=False), nn.Linear(5, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.embed(x)))).mean(1))


class Wide(nn.Module):
    """One position-shared Linear where T is large and the layer small: per-sample weight gradients are cheaper."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sin(self.embed(x))).mean(1)


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Functional(nn.Module):
    """A weight used by its layer and once more directly."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x)) + x @ self.layer.weight)


class Residual(nn.Module):
    """Skip connection, a scalar parameter used directly, and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 1)
        self.unused = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.relu(self.first(x))
        return self.gain * self.head(x + torch.tanh(self.second(x))).squeeze(-1)


class Unused(nn.Module):
    """Linear layers only, one of which never runs: its columns of J are zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3)
        self.unused = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class PlainNorm(nn.Module):
    """A norm without parameters between Linear layers: structured, and second derivatives run through it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.layer_norm(self.first(x), (6,)))


class Bilinear(nn.Module):
    """A bilinear map at every position, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.head = nn.Bilinear(2, 3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.map(x[..., :2], x[..., 2:])).sum(1) + self.map(x[:, 0, :2], x[:, 1, 2:]))


class Attention(nn.Module):
    """A transformer block: attention, norms, and a learned token used directly."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.attend = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        y = self.norm(x)
        return self.head((x + self.attend(y, y, y, need_weights=False)[0])[:, 0])


def half_frozen() -> nn.Module:
    module = mlp(3)
    module[0].weight.requires_grad_(False)
    return module


def mlp(outputs: int) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 8), nn.GELU(), nn.Dropout(0.5), nn.Linear(8, outputs))


CASES = [
    Case("mlp-c1", lambda: mlp(1), (5,), structured=True),
    Case("mlp-c3", lambda: mlp(3), (5,), structured=True),
    Case("half-frozen", half_frozen, (5,), structured=True),
    Case("inplace-relu", lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (4,), True),
    Case("tokens-c1", lambda: Tokens(1), (4, 3), structured=True),
    Case("tokens-c3", lambda: Tokens(3), (4, 3), structured=True),
    Case("wide-positions", Wide, (16, 2), structured=True),
    Case("unused-layer", Unused, (4,), structured=True),
    Case(
        "cnn-batchnorm",
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
        (1, 6, 6),
        structured=True,
    ),
    Case("layernorm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)), (4,), True),
    Case("plain-layernorm", PlainNorm, (4,), structured=True),
    Case(
        "instance-norm",
        lambda: nn.Sequential(nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.Linear(6, 2)),
        (2, 3),
        True,
    ),
    Case("attention", Attention, (4, 6), structured=True),
    Case("bilinear", Bilinear, (4, 5), structured=True),
    Case("tied", Tied, (4,), structured=True),
    Case("called-twice", Twice, (4,), structured=True),
    Case("functional-use", Functional, (4,), structured=True),
    Case("residual-scalar-unused", Residual, (4,), structured=True),
    Case("lstm", lambda: nn.Sequential(nn.LSTM(3, 4, batch_first=True), LastState(), nn.Linear(4, 2)), (5, 3), True),
]


class LastState(nn.Module):
    def forward(self, returned: tuple[Tensor, tuple[Tensor, Tensor]]) -> Tensor:
        return returned[0][:, -1]
