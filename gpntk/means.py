"""The network itself as a prior mean."""

from __future__ import annotations

import copy
from typing import final

from gpytorch.means import Mean
from torch import Tensor, nn

from gpntk._checks import check_input
from gpntk.errors import SelectionError
from gpntk.network import FrozenNetwork


@final
class NetworkMean(Mean):
    """f(x; w*), the frozen network's own output: `[..., N]` for C = 1, `[..., N, C]` otherwise.

    With `gpntk.NTKKernel` it makes the GP a prior over the network's linearization, centred at the pretrained weights;
    the GP then learns the residual y - f(x).

    Args:
        network: The network, or a `gpntk.FrozenNetwork`.
        input_shape: Shape of one input as the network wants it; x then arrives flat.

    Example:
        >>> import torch, gpntk
        >>> gpntk.NetworkMean(torch.nn.Linear(3, 1))(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(self, network: nn.Module, input_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        if isinstance(network, FrozenNetwork) and input_shape is not None:
            raise SelectionError("the network is frozen already: give input_shape to gpntk.freeze instead.")
        frozen = isinstance(network, FrozenNetwork)
        self.network = copy.deepcopy(network) if frozen else FrozenNetwork(network, None, input_shape)

    def forward(self, x: Tensor) -> Tensor:
        """f(x; w*) for x `[..., N, D]`."""
        check_input(x, self.network.device)
        outputs = self.network(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return outputs.squeeze(-1) if self.network.num_outputs(x) == 1 else outputs
