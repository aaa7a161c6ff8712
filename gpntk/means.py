"""The network itself as a prior mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from gpytorch.means import Mean
from torch import Tensor, nn

from gpntk._checks import check_input, check_tensors
from gpntk._types import Extract
from gpntk.network import freeze


@final
class NetworkMean(Mean):
    """f(x; w*), the frozen network's own output: `[..., N]` for C = 1, `[..., N, C]` otherwise.

    With `gpntk.NTKKernel` it makes the GP a prior over the network's linearization, centred at the pretrained weights;
    the GP then learns the residual y - f(x).

    Args:
        network: The network, or a `gpntk.FrozenNetwork`.
        input_shape: Shape of one input as the network wants it; x then arrives flat.
        extract: Turns what the network returns (a dict, say) into the tensor `[N]` or `[N, C]` that is meant.

    Raises:
        SelectionError: ``input_shape`` or ``extract`` is given with a network that is frozen already.
        InputError: x is not floating, finite and `[..., N, D]`, is on another device, or does not fit the network.

    Example:
        >>> import torch, gpntk
        >>> gpntk.NetworkMean(torch.nn.Linear(3, 1))(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self, network: nn.Module, *, input_shape: Sequence[int] | None = None, extract: Extract | str | None = None
    ) -> None:
        super().__init__()
        self.network = freeze(network, None, input_shape, extract)

    def __call__(self, x: Tensor) -> Any:
        """f(x; w*); see `forward`."""
        check_tensors(x=x)  # before the host reads its dimensions
        return super().__call__(x)

    def forward(self, x: Tensor) -> Tensor:
        """The network's outputs f(x; w*) for x `[..., N, D]`."""
        check_input(x, self.network.device)
        single = self.network.num_outputs(x) == 1
        outputs = self.network(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return outputs.squeeze(-1) if single else outputs

    def __repr__(self) -> str:
        return f"NetworkMean({self.network.summary})"
