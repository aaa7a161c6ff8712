"""EfficientNet-B0 and a network of DistilBERT's layers and sizes, of plain torch, with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Expansion, channels, blocks, stride and kernel of each stage: Tan and Le (2019), table 1.
_STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)


def _convolution(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs)]


class _Squeeze(nn.Module):
    """Channels scaled by what their means say."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        layers = nn.Conv2d(width, inner, 1), nn.SiLU(), nn.Conv2d(inner, width, 1), nn.Sigmoid()
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), *layers)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


class _MBConv(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        wide = inputs * expansion
        widening = [*_convolution(inputs, wide), nn.SiLU()] if expansion > 1 else []
        depthwise = [*_convolution(wide, wide, kernel, stride, wide), nn.SiLU(), _Squeeze(wide, inputs // 4)]
        self.layers = nn.Sequential(*widening, *depthwise, *_convolution(wide, outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def efficientnet(outputs: int = 10) -> nn.Sequential:
    """EfficientNet-B0 for images `[N, 3, H, W]`."""
    layers, inputs = [*_convolution(3, 32, 3, 2), nn.SiLU()], 32
    for expansion, channels, blocks, stride, kernel in _STAGES:
        for block in range(blocks):
            layers.append(_MBConv(inputs, channels, expansion, 1 if block else stride, kernel))
            inputs = channels
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, outputs)
    return nn.Sequential(*layers, *_convolution(inputs, 1280), nn.SiLU(), *head)


class DistilBert(nn.Module):
    """Token ids `[N, T]` through six post-norm layers of width 768; the first token is read out."""

    def __init__(self, vocab: int = 30522, context: int = 512, dim: int = 768, outputs: int = 10) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(vocab, dim), nn.Embedding(context, dim), nn.LayerNorm(dim)
        layer = nn.TransformerEncoderLayer(dim, dim // 64, 4 * dim, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.hidden, self.head = nn.Linear(dim, dim), nn.Linear(dim, outputs)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        first = self.encoder(self.norm(self.words(ids) + self.places(places)))[:, 0]
        return self.head(self.hidden(first).relu())
