"""What training does to an infinitely wide or linearised network, in closed form."""

from gpntk.dynamics.flow import GradientFlow

__all__ = ["GradientFlow"]
