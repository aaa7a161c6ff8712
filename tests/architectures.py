"""Real architectures, built from plain torch, as data for tests and benchmarks.

Everything takes its sizes as arguments. The defaults are a size that people train, for benchmarks: `ResNet()` is
ResNet-18 for 32x32 images and ten classes. `ARCHITECTURES` builds the same code so small that the reference Jacobian
of `tests.cases` is cheap. `outside_models` adds tiny models of torchvision and transformers where they are installed.

Initial values that would make a test blind are replaced by `roughened`: norms that are the identity, zero biases,
LayerScale and LoRA matrices that silence their branch, running statistics of a network that saw no data.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.cases import Case


@torch.no_grad()
def roughened(module: nn.Module) -> nn.Module:
    """``module`` with noise on every constant parameter, and running statistics as after training."""
    for parameter in module.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.3 * torch.randn_like(parameter))
    for norm in module.modules():
        if isinstance(norm, _NormBase) and norm.running_mean is not None and norm.running_var is not None:
            norm.running_mean.normal_(0.0, 0.1)
            norm.running_var.uniform_(0.05, 0.5)
    return module


def token_ids(x: Tensor, vocab: int) -> Tensor:
    """Token ids from floats, since x is Gaussian in every case: constant in x almost everywhere."""
    return (x.abs() * 7).long() % vocab


def perceptron(*sizes: int) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.GELU())]
    return nn.Sequential(*layers[:-1])


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Applied(nn.Module):
    """formula(x, what), for ``what`` a parameter used directly, or a layer that is not called with x alone."""

    def __init__(self, what: nn.Parameter | nn.Module, formula: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.what, self.formula = what, formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(x, self.what)


def per_frame(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def turned(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)


def twice(x: Tensor, layer: nn.Module) -> Tensor:
    return torch.tanh(layer(torch.tanh(layer(x))))


def of_tokens(x: Tensor, layer: nn.Embedding | nn.EmbeddingBag) -> Tensor:
    return layer(token_ids(x, layer.num_embeddings))


def logits(x: Tensor, model: Any) -> Tensor:
    return model(token_ids(x, model.config.vocab_size)).logits.mean(1)


def mixed(x: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("nti,tio->no", x, weights)


def of_halves(x: Tensor, layer: nn.Bilinear) -> Tensor:
    return layer(*x.chunk(2, dim=-1))


# --- images ----------------------------------------------------------------------------------------------------------


def lenet(image: int = 32, kernel: int = 5, widths: tuple[int, ...] = (6, 16, 120, 84)) -> nn.Sequential:
    """For x `[N, 1, image, image]`."""
    first, second = nn.Conv2d(1, widths[0], kernel), nn.Conv2d(widths[0], widths[1], kernel)
    side = ((image - kernel + 1) // 2 - kernel + 1) // 2
    readout = perceptron(widths[1] * side**2, *widths[2:], 10)
    return nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), readout)


class BasicBlock(nn.Module):
    """Two convolutions and a shortcut, added and rectified in place as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        same = stride == 1 and inputs == outputs
        self.downsample = None if same else nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """ResNet of BasicBlocks for small images: x `[N, 3, H, W]`, one stage per entry of ``depths``."""

    def __init__(self, depths: tuple[int, ...] = (2, 2, 2, 2), width: int = 64, outputs: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.blocks = nn.ReLU(inplace=True), nn.Sequential()
        inputs = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                self.blocks.append(BasicBlock(inputs, width * 2**stage, stride=2 if stage and not block else 1))
                inputs = width * 2**stage
        self.head = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def mobilenet(width: int = 32, depth: int = 4, expansion: int = 6, outputs: int = 10) -> nn.Sequential:
    """For x `[N, 3, H, W]`: blocks of a depthwise convolution between a pointwise and a grouped one."""
    wide = width * expansion
    blocks = [
        Residual(
            *(nn.Conv2d(width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.BatchNorm2d(wide), nn.Hardswish(inplace=True)),
            *(nn.Conv2d(wide, width, 1, groups=2), nn.BatchNorm2d(width)),
        )
        for _ in range(depth)
    ]
    stem, pool = nn.Conv2d(3, width, 3, stride=2, padding=1), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(stem, *blocks, pool, nn.Flatten(), nn.Linear(width, outputs))


class UNet(nn.Module):
    """x `[N, channels, H, W]`, H and W divisible by 2^depth; outputs per pixel, averaged."""

    def __init__(self, channels: int = 3, width: int = 32, depth: int = 3, outputs: int = 10) -> None:
        super().__init__()
        widths = [channels, *(width * 2**level for level in range(depth + 1))]
        climb = list(pairwise(widths[:0:-1]))
        self.down = nn.ModuleList(self.block(*pair, width // 2) for pair in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(*pair, 2, stride=2) for pair in climb)
        self.merge = nn.ModuleList(self.block(*pair, width // 2) for pair in climb)
        self.pool, self.head = nn.MaxPool2d(2), nn.Conv2d(width, outputs, 1)

    @staticmethod
    def block(inputs: int, outputs: int, groups: int) -> nn.Sequential:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        norms = nn.GroupNorm(groups, outputs), nn.GroupNorm(groups, outputs)
        return nn.Sequential(first, norms[0], nn.ReLU(inplace=True), second, norms[1], nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, down in enumerate(self.down):
            skips.append(down(self.pool(skips[-1]) if level else x))
        x = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x).mean((2, 3))


def video(frames: int = 8, width: int = 32, outputs: int = 10) -> nn.Sequential:
    """For x `[N, frames, 3, H, W]`: frames are folded into the rows for a shared network, and unfolded after it."""
    shared = nn.Conv2d(3, width, 3, stride=2, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    readout = perceptron(frames * width, width, outputs)
    return nn.Sequential(Applied(nn.Sequential(*shared), per_frame), nn.Flatten(), readout)


# --- attention -------------------------------------------------------------------------------------------------------


class ViTBlock(nn.Module):
    """Pre-norm block of nn.MultiheadAttention and an MLP, each branch scaled by a LayerScale vector."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = nn.MultiheadAttention(dim, heads, batch_first=True), perceptron(dim, 4 * dim, dim)
        self.scale1, self.scale2 = nn.Parameter(torch.full((dim,), 0.1)), nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.scale1 * self.attention(y, y, y, need_weights=False)[0]
        return x + self.scale2 * self.mlp(self.norm2(x))


class ViT(nn.Module):
    """x `[N, 3, image, image]`; the defaults are ViT-Ti for 32x32 images."""

    def __init__(self, image: int = 32, patch: int = 4, dim: int = 192, depth: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.patch, self.token = nn.Conv2d(3, dim, patch, stride=patch), nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(0.2 * torch.randn(1, (image // patch) ** 2 + 1, dim))
        self.blocks = nn.Sequential(*(ViTBlock(dim, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class SelfAttention(nn.Module):
    """Attention with one Linear for queries, keys and values; ``window`` > 0 adds Swin's table of relative biases."""

    def __init__(self, dim: int, heads: int, causal: bool = False, window: int = 0) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.causal = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), heads, causal
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        self.index: Tensor
        self.register_buffer("index", (at[:, None] - at + window - 1) @ torch.tensor([2 * window - 1, 1]))
        self.table = nn.Parameter(0.5 * torch.randn((2 * window - 1) ** 2, heads)) if window else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if self.table is None else self.table[self.index].permute(2, 0, 1)
        y = scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class GPT(nn.Module):
    """Decoder for tokens x `[N, T]`; a head ``tied`` to the token embedding has C = vocab."""

    def __init__(
        self, vocab: int = 256, context: int = 64, dim: int = 192, depth: int = 6, heads: int = 6, tied: bool = False
    ) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(vocab, dim), nn.Embedding(context, dim)
        self.blocks, self.norm = nn.Sequential(), nn.LayerNorm(dim)
        for _ in range(depth):
            self.blocks.append(Residual(nn.LayerNorm(dim), SelfAttention(dim, heads, causal=True)))
            self.blocks.append(Residual(nn.LayerNorm(dim), perceptron(dim, 4 * dim, dim)))
        self.head = nn.Linear(dim, vocab if tied else 10, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], device=x.device)
        h = self.token(token_ids(x, self.token.num_embeddings)) + self.position(positions)
        return self.head(self.norm(self.blocks(h))).mean(1)


class Swin(nn.Module):
    """x `[N, side, side, inputs]`: rows folded with windows, then again with windows shifted by half of one."""

    def __init__(
        self, inputs: int = 48, dim: int = 96, heads: int = 3, window: int = 4, relative: bool = False
    ) -> None:
        super().__init__()
        self.embed, self.window, self.head = nn.Linear(inputs, dim), window, nn.Linear(dim, 10)
        self.attend = nn.ModuleList(SelfAttention(dim, heads, window=relative * window) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x, w, windows = self.embed(x), self.window, x.shape[1] // self.window
        for attend in self.attend:
            folded = x.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(0, 2).flatten(1, 2)
            y = attend(folded).unflatten(1, (w, w)).unflatten(0, (-1, windows, windows))
            x = (x + y.transpose(2, 3).flatten(3, 4).flatten(1, 2)).roll((-(w // 2), -(w // 2)), (1, 2))
        return self.head(torch.tanh(x).mean((1, 2)))


# --- sequences, graphs, and parameters used directly -----------------------------------------------------------------


class Recurrent(nn.Module):
    """x `[N, T, features]` through two layers of a ``cell``; the outputs are averaged over T and read out to `[N]`."""

    def __init__(self, cell: Callable[..., nn.RNNBase], features: int = 32, hidden: int = 256, **options: bool) -> None:
        super().__init__()
        self.cell, self.first = cell(features, hidden, 2, **options), options.get("batch_first", False)
        self.head = nn.Linear(hidden * (1 + self.cell.bidirectional), 1)

    def forward(self, x: Tensor) -> Tensor:
        states = self.cell(x)[0] if self.first else self.cell(x.transpose(0, 1))[0].transpose(0, 1)
        return self.head(states.mean(1)).squeeze(-1)


class GraphConv(nn.Module):
    """x `[N, nodes, features]` on a fixed random graph: H <- act(A (H W + b)), A with unit row sums."""

    def __init__(self, nodes: int = 64, features: int = 16, hidden: int = 64, outputs: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, hidden), nn.Linear(hidden, outputs)
        edges = torch.eye(nodes) + (torch.rand(nodes, nodes) < 0.3)
        self.adjacency: Tensor
        self.register_buffer("adjacency", edges / edges.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.adjacency @ self.second(relu(self.adjacency @ self.first(x)))).mean(1)


class LoRA(nn.Module):
    """A frozen Linear plus a low-rank update by plain parameters."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(inputs, rank)), nn.Parameter(torch.zeros(rank, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down @ self.up


# --- the table -------------------------------------------------------------------------------------------------------


def tail(features: int, wrap: Callable[[nn.Linear], nn.Module] = nn.Sequential) -> tuple[nn.Module, ...]:
    return nn.Tanh(), nn.Flatten(), wrap(nn.Linear(features, 3))


def _case(name: str, shape: tuple[int, ...], build: Callable[[], nn.Module], structured: bool = True) -> Case:
    return Case(name, lambda: roughened(build()), shape, structured)


def _net(name: str, shape: tuple[int, ...], layers: Callable[[], Any], structured: bool = True) -> Case:
    return _case(name, shape, lambda: nn.Sequential(*layers()), structured)


ARCHITECTURES: list[Case] = [
    _case("lenet", (1, 14, 14), lambda: lenet(14, 3, (3, 4, 8, 6))),
    _case("resnet", (3, 6, 6), lambda: ResNet((1, 2), 3, 3)),
    _case("mobilenet", (3, 6, 6), lambda: mobilenet(4, 2, 3, 3)),
    _case("unet", (1, 4, 4), lambda: UNet(1, 2, 1, 3)),
    _case("video", (3, 3, 4, 4), lambda: video(3, 4, 3)),
    _case("vit", (3, 4, 4), lambda: ViT(4, 2, 4, 2, 2)),
    _case("swin", (4, 4, 3), lambda: Swin(3, 6, 2, 2)),
    _case("swin-relative-bias", (4, 4, 3), lambda: Swin(3, 6, 2, 2, relative=True)),
    _case("gpt", (5,), lambda: GPT(11, 7, 4, 2, 2)),
    _case("gpt-tied", (5,), lambda: GPT(11, 7, 4, 2, 2, tied=True)),
    _case("lstm", (5, 3), lambda: Recurrent(nn.LSTM, 3, 4, batch_first=True)),
    _case("lstm-bidirectional", (5, 3), lambda: Recurrent(nn.LSTM, 3, 4, batch_first=True, bidirectional=True)),
    _case("lstm-sequence-first", (5, 3), lambda: Recurrent(nn.LSTM, 3, 4)),
    _case("gru", (5, 3), lambda: Recurrent(nn.GRU, 3, 4, batch_first=True)),
    _case("rnn", (5, 3), lambda: Recurrent(nn.RNN, 3, 4, batch_first=True)),
    _case("graph", (6, 3), lambda: GraphConv(6, 3, 5, 3)),
    _net("encoder", (5, 4), lambda: (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), *tail(20))),
    _net("encoder-sequence-first", (5, 4), lambda: (Applied(nn.TransformerEncoderLayer(4, 2, 8), turned), *tail(20))),
    _net("embedding-padding", (5,), lambda: (Applied(nn.Embedding(7, 4, padding_idx=0), of_tokens), *tail(20))),
    _net("conv-called-twice", (3, 4, 4), lambda: (Applied(nn.Conv2d(3, 3, 3, padding=1), twice), *tail(48))),
    _net("conv1d", (2, 9), lambda: (nn.Conv1d(2, 4, 3, 2, 2, dilation=2, padding_mode="circular"), *tail(20))),
    _net("conv3d", (2, 4, 4, 4), lambda: (nn.Conv3d(2, 3, 3, 2, 1), nn.Tanh(), nn.Conv3d(3, 4, 2), *tail(4))),
    _net("norms", (2, 7), lambda: (nn.InstanceNorm1d(2, affine=True), nn.Conv1d(2, 4, 3), nn.RMSNorm(5), *tail(20))),
    _net("weight-norm", (2, 6), lambda: (weight_norm(nn.Conv1d(2, 4, 3)), *tail(16, weight_norm))),
    _net("spectral-norm", (2, 6), lambda: (spectral_norm(nn.Conv1d(2, 4, 3)), *tail(16, spectral_norm))),
    _net("lora", (5, 4), lambda: (LoRA(4, 6, 2), nn.GELU(), LoRA(6, 3, 1), *tail(15))),
    _net("gain", (4,), lambda: (nn.Linear(4, 5), Applied(nn.Parameter(torch.tensor(0.7)), torch.mul), *tail(5))),
    _net(
        "matrix", (5, 4), lambda: (nn.Linear(4, 6), Applied(nn.Parameter(torch.randn(6, 3)), torch.matmul), *tail(15))
    ),
    _net("einsum", (5, 4), lambda: (Applied(nn.Parameter(torch.randn(5, 4, 3)), mixed), *tail(3)), structured=False),
    _net("prelu", (4,), lambda: (nn.Linear(4, 6), nn.PReLU(6), *tail(6))),
    _net("embedding-bag", (5,), lambda: (Applied(nn.EmbeddingBag(11, 4), of_tokens), *tail(4))),
    _net("bilinear", (6,), lambda: (Applied(nn.Bilinear(3, 3, 5), of_halves), *tail(5))),
]


def outside_models() -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
    """(name, builder, input shape) of tiny torchvision and transformers models, where those packages are installed."""
    if find_spec("torchvision"):
        vision = import_module("torchvision.models")
        yield "tv-densenet", lambda: roughened(vision.DenseNet(4, (2, 2), 4, num_classes=3)), (3, 32, 32)
        yield "tv-shufflenet", lambda: roughened(vision.ShuffleNetV2([1, 1, 1], [4, 8, 8, 8, 8], 3)), (3, 32, 32)
        yield "tv-vit", lambda: roughened(vision.VisionTransformer(8, 4, 2, 2, 8, 16, num_classes=3)), (3, 8, 8)
        swin = [2, 2], 8, [2, 2], [2, 4], [2, 2]
        yield "tv-swin", lambda: roughened(vision.SwinTransformer(*swin, num_classes=3)), (3, 16, 16)
    if find_spec("transformers"):
        hub, sizes = import_module("transformers"), {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 8}
        gpt2 = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
        yield "hf-gpt2", lambda: Applied(hub.GPT2LMHeadModel(hub.GPT2Config(**gpt2)), logits), (5,)
        yield "hf-bert", lambda: Applied(hub.BertForMaskedLM(hub.BertConfig(**sizes)), logits), (5,)
        yield "hf-llama", lambda: Applied(hub.LlamaForCausalLM(hub.LlamaConfig(**sizes)), logits), (5,)
