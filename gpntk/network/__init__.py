"""The function that a trained network is: its frozen weights, the parameters that may move, and its readout."""

from gpntk.network.frozen import FrozenNetwork, freeze

__all__ = ["FrozenNetwork", "freeze"]
