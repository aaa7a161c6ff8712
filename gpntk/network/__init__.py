"""The function that a trained network is: its frozen weights, what it takes and returns, and its readout."""

from gpntk.network.adapters import Adapter
from gpntk.network.frozen import FrozenNetwork, freeze

__all__ = ["Adapter", "FrozenNetwork", "freeze"]
