"""Infinitely wide networks: both kernels in one pass, and what they are made of.

Closed forms of activations are in `gpntk.infinite.closed_forms`, order and chaos in `gpntk.infinite.phases`.
"""

from gpntk.infinite import closed_forms as closed_forms
from gpntk.infinite import phases as phases
from gpntk.infinite.activations import activation_of
from gpntk.infinite.gaussian import AbstractActivation
from gpntk.infinite.infinite_kernels import InfiniteKernels, kernels
from gpntk.infinite.modules import Activation, LocallyConnected, TiedAttention
from gpntk.infinite.monte_carlo import SampledKernels, monte_carlo
from gpntk.infinite.quadrature import Quadrature
from gpntk.infinite.straight_lines import PiecewiseLinear
from gpntk.infinite.trace import trace

__all__ = [
    "AbstractActivation",
    "Activation",
    "InfiniteKernels",
    "LocallyConnected",
    "PiecewiseLinear",
    "Quadrature",
    "SampledKernels",
    "TiedAttention",
    "activation_of",
    "kernels",
    "monte_carlo",
    "trace",
]
