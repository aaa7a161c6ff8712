"""Convolutions in one to three dimensions, and their transposes."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from gpntk.jacobians.rules import weight_sharing
from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, RuleSizes, outer, register, weighted
from gpntk.jacobians.rules.weight_sharing import Positions
from gpntk.memory import chunks, workspace

Sizes = tuple[int, ...]


@final
@dataclass(frozen=True)
class ConvRule(AbstractLayerRule):
    """Products are convolutions too: all columns in one, with K times as many output channels.

    Index legend: b batch, n/m rows, f copies of a row, c/d outputs, h groups, i/o input/output channels of a group,
    x output positions, k columns. Factors: a `[B, N, f, I, *S]`, g `[B, N, C, f, O, *S']`. Flops per column:
    2*N*T*O*I*|kernel| each way. Gram: a linear layer over the patches of a, T positions wide (of g, for a transposed
    convolution), by the cheapest way of `weight_sharing`. Several uses on inputs of one size are more copies.

    Attributes:
        shape: The weight's shape, `[O, I/groups, *kernel]`, or `[I, O/groups, *kernel]` if transposed.
        size: S.
    """

    shape: Sizes
    size: Sizes
    stride: Sizes
    padding: Sizes
    dilation: Sizes
    transposed: bool
    output_padding: Sizes
    groups: int

    def factors(self, inputs: tuple[Tensor, ...], cotangents: Tensor) -> Factors:
        return Factors(inputs[0], cotangents)

    def jvp(self, factors: Factors, tangents: Mapping[str, Tensor]) -> Tensor:
        a, g = factors.pair
        total = None
        if "weight" in tangents:
            total = torch.stack([self._jvp(*batch) for batch in zip(a, g, tangents["weight"], strict=True)])
        if "bias" in tangents:
            term = torch.einsum("bko,bnco->bknc", tangents["bias"], _over_positions(g))
            total = term if total is None else total + term
        assert total is not None
        return total

    def vjp(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        # In chunks of rows, not only of columns: the weighted cotangents would be K times a layer's output.
        total: dict[str, Tensor] = {}
        for rows in self._row_chunks(factors.cotangents[0], u.shape[1]):
            part = factors.rows(rows)
            for own, image in self._images(part, u[:, :, rows]).items():
                total[own] = total[own] + image if own in total else image
        return total

    def _images(self, factors: Factors, u: Tensor) -> dict[str, Tensor]:
        a, g = factors.pair
        w = weighted(g, u)  # [B, N, K, f, O, *S']
        result = {}
        if "weight" in self.own:
            result["weight"] = torch.stack([self._image(*batch) for batch in zip(a, w, strict=True)])
        if "bias" in self.own:
            result["bias"] = w.flatten(5).sum((1, 3, 5))
        return result

    def gram(self, left: Factors, right: Factors) -> Tensor:
        terms = []
        for group in range(self.groups) if "weight" in self.own else ():
            one = self.positions(left, group)
            terms.append(weight_sharing.gram(one, one if left is right else self.positions(right, group)))
        if "bias" in self.own:
            terms.append(outer(_over_positions(left.cotangents), _over_positions(right.cotangents)))
        return functools.reduce(torch.add, terms)

    def gradients(self, factors: Factors) -> dict[str, Tensor]:
        result = {}
        if "weight" in self.own:
            parts = [weight_sharing.gradients(self.positions(factors, group)) for group in range(self.groups)]
            weight = torch.stack(parts, 3)  # [B, N, C, groups, O', I'], with the kernel in O' if transposed, else in I'
            if self.transposed:
                weight = weight.transpose(-2, -1)
            result["weight"] = weight.reshape(*weight.shape[:3], *self.shape)
        if "bias" in self.own:
            result["bias"] = _over_positions(factors.cotangents)
        return result

    def diagonal(self, factors: Factors) -> Tensor:
        terms = []
        if "weight" in self.own:
            terms = [weight_sharing.diagonal(self.positions(factors, group)) for group in range(self.groups)]
        if "bias" in self.own:
            terms.append(_over_positions(factors.cotangents).square().sum(-1))
        return torch.stack(terms).sum(0)

    def sizes(self, factors: Factors) -> RuleSizes:
        one = Factors(*(tensor[:1, :1] for tensor in factors.pair))
        c, t, i, o = self.positions(one, 0).sizes
        tile, i = weight_sharing.tile(c, t, i, o), i if "weight" in self.own else 0
        pair = weight_sharing.cheapest(c, t, i, o)[1]
        column = one.cotangents[:, :, 0].numel()  # of one row: rows are chunked here
        return RuleSizes(self.groups * t * o * (i + c), self.groups * pair, column, tile)

    def positions(self, factors: Factors, group: int) -> Positions:
        """One group as a linear layer over patches: a `[B, N, T, I']`, g `[B, N, C, T, O']`, T over copies too."""
        a, g = factors.pair
        inputs, outputs = a.shape[3] // self.groups, g.shape[4] // self.groups
        a = a[:, :, :, group * inputs : (group + 1) * inputs]
        g = g[:, :, :, :, group * outputs : (group + 1) * outputs]
        if self.transposed:
            g = self._patches(g, a.shape[4:])
            a = a.flatten(4).transpose(3, 4)
            return Positions(a.flatten(2, 3), g.flatten(3, 4))
        a = self._patches(a, g.shape[5:])
        return Positions(a.flatten(2, 3), g.flatten(5).transpose(4, 5).flatten(3, 4))

    def _patches(self, x: Tensor, positions: Sizes) -> Tensor:
        """Patches of x `[..., channels, *S]` at so many positions: `[..., T, channels*|kernel|]`."""
        spatial = len(positions)
        x = functional.pad(x, [pad for size in reversed(self.padding) for pad in (size, size)])
        for size, stride, dilation, count in zip(self.shape[2:], self.stride, self.dilation, positions, strict=True):
            # Each step turns the first spatial dimension left into (positions, kernel) and moves both to the end.
            x = x.unfold(-spatial, dilation * (size - 1) + 1, stride).narrow(-spatial - 1, 0, count)[..., ::dilation]
            x = x.movedim(-spatial - 1, -2)
            spatial += 1
        # [..., channels, T1, k1, T2, k2, ...]
        dims = len(positions)
        lead = x.dim() - 2 * dims - 1
        order = [*range(lead), *(lead + 1 + 2 * d for d in range(dims)), lead, *(lead + 2 + 2 * d for d in range(dims))]
        return x.permute(order).flatten(lead, lead + dims - 1).flatten(lead + 1)

    def _jvp(self, a: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """<ds, g> `[K, N, C]` for a `[N, f, I, *S]`, g `[N, C, f, O, *S']` and tangents of the weight `[K, *shape]`."""
        parts = []
        for rows in self._row_chunks(g, len(weight)):
            s = self._tangents(a[rows].flatten(0, 1), weight, g.shape[4:])
            s = s.unflatten(0, (-1, a.shape[1]))  # [N, f, groups, K, O/groups, T]
            split = g[rows].flatten(4).unflatten(3, (self.groups, -1))
            parts.append(torch.einsum("nfhkox,ncfhox->knc", s, split))
        return torch.cat(parts, 1)

    def _tangents(self, a: Tensor, weight: Tensor, positions: Sizes) -> Tensor:
        """ds `[N, groups, K, O/groups, T]` for a `[N, I, *S]`."""
        if self._by_patches(a, math.prod(positions)):
            # One GEMM for all columns: [N*T, I*kernel] @ [I*kernel, K*O].
            s = self._patches(a, positions).flatten(0, 1) @ weight.flatten(2).flatten(0, 1).mT
            return s.view(len(a), 1, -1, len(weight), weight.shape[1]).permute(0, 1, 3, 4, 2)
        options = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        s = torch.ops.aten.convolution(a, self._stacked(weight), None, *options)
        return s.flatten(2).unflatten(1, (self.groups, len(weight), -1))

    def _image(self, a: Tensor, w: Tensor) -> Tensor:
        """Gradient of the weight `[K, *shape]` for a `[N, f, I, *S]` and cotangents w `[N, K, f, O, *S']`."""
        columns, positions = w.shape[1], w.shape[4:]
        a, w = a.flatten(0, 1), w.transpose(1, 2).flatten(0, 1)
        if self._by_patches(a, math.prod(positions)):
            # One GEMM for all columns: [K*O, N*T] @ [N*T, I*kernel].
            channels = w.flatten(3).permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
            return (
                (channels @ self._patches(a, positions).flatten(0, 1))
                .unflatten(0, (columns, -1))
                .reshape(columns, *self.shape)
            )
        # [N, groups*K*O/groups, *S']: the channels of a convolution with K times as many outputs.
        w = w.unflatten(2, (self.groups, -1)).transpose(1, 2).flatten(1, 3)
        first, second, *kernel = self.shape
        stacked = (first, columns * second, *kernel) if self.transposed else (columns * first, second, *kernel)
        options = (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, self.groups)
        shaped = a.new_zeros(1).expand(stacked)  # only its shape is read
        image = torch.ops.aten.convolution_backward(w, a, shaped, None, *options, [False, True, False])[1]
        return self._unstacked(image, columns)

    def _by_patches(self, a: Tensor, positions: int) -> bool:
        """Whether the weight outweighs the activations, so that a GEMM over patches moves less memory."""
        return not self.transposed and self.groups == 1 and math.prod(self.shape[1:]) > a.shape[0] * positions

    def _row_chunks(self, g: Tensor, columns: int) -> Iterator[slice]:
        """Chunks of the rows of g `[N, C, ...]` whose outputs for all columns fit the workspace."""
        row_bytes = columns * g[0, 0].numel() * g.element_size()
        return chunks(g.shape[0], row_bytes, workspace(g.device, 2**30) // 2)

    def _stacked(self, weight: Tensor) -> Tensor:
        """Weights of K columns `[K, *shape]` as those of one convolution, output channels in order (group, K, O)."""
        if self.transposed:
            return weight.movedim(0, 1).flatten(1, 2)
        return weight.unflatten(1, (self.groups, -1)).transpose(0, 1).flatten(0, 2)

    def _unstacked(self, stacked: Tensor, columns: int) -> Tensor:
        if self.transposed:
            return stacked.unflatten(1, (columns, -1)).movedim(1, 0)
        return stacked.unflatten(0, (self.groups, columns, -1)).transpose(0, 1).flatten(1, 2)


def _over_positions(g: Tensor) -> Tensor:
    """Sum over copies and positions, `[B, N, C, O]`."""
    return g.flatten(5).sum((3, 5)) if g.dim() > 5 else g.sum(3)


def _bind_convolution(dims: int, transposed: bool) -> Callable[..., Binding | None]:
    def plain(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        output_padding: Any = 0,
    ) -> Binding | None:
        if isinstance(padding, str):
            padding = _resolved(padding, weight.shape[2:], _sizes(dilation, dims))
        if input.dim() != dims + 2 or isinstance(padding, str):
            return None
        operands = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        options = {"stride": stride, "padding": padding, "dilation": dilation, "output_padding": output_padding}
        rule = ConvRule(
            tuple(operands),
            shape=tuple(weight.shape),
            size=tuple(input.shape[2:]),
            transposed=transposed,
            groups=groups,
            **{name: _sizes(option, dims) for name, option in options.items()},
        )
        return Binding(rule, (input,), operands, first_axis=True)

    def transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Binding | None:
        return plain(input, weight, bias, stride, padding, dilation, groups, output_padding)

    return transpose if transposed else plain


def _sizes(value: Any, dims: int) -> Sizes:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * dims if len(sizes) == 1 else sizes


def _resolved(padding: str, kernel: Sizes, dilation: Sizes) -> Sizes | str:
    """The words "valid" and "same" as numbers; "same" for an even kernel pads unevenly and has no rule."""
    if padding == "valid":
        return (0,) * len(kernel)
    totals = [step * (size - 1) for size, step in zip(kernel, dilation, strict=True)]
    return padding if any(total % 2 for total in totals) else tuple(total // 2 for total in totals)


register(torch.conv1d)(_bind_convolution(1, transposed=False))
register(torch.conv2d)(_bind_convolution(2, transposed=False))
register(torch.conv3d)(_bind_convolution(3, transposed=False))
register(torch.conv_transpose1d)(_bind_convolution(1, transposed=True))
register(torch.conv_transpose2d)(_bind_convolution(2, transposed=True))
register(torch.conv_transpose3d)(_bind_convolution(3, transposed=True))
