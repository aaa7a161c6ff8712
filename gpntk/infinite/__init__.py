"""Infinitely wide networks: Gaussian moments of activations, and what layers make of them."""

from gpntk.infinite import phases
from gpntk.infinite.activations import ACTIVATIONS, Activation, activation_of
from gpntk.infinite.attention import TiedAttention
from gpntk.infinite.closed_forms import (
    GELU,
    ABReLU,
    Erf,
    Exponential,
    Gaussian,
    Polynomial,
    RectifiedMonomial,
    Sign,
    Sine,
    Step,
    cosine,
    hermite,
    monomial,
    rbf,
)
from gpntk.infinite.gaussian import AbstractActivation
from gpntk.infinite.layers import Parametrization, Weights
from gpntk.infinite.locally_connected import LocallyConnected
from gpntk.infinite.moments import LayerMoments
from gpntk.infinite.monte_carlo import SampledKernels, monte_carlo
from gpntk.infinite.piecewise_linear import PiecewiseLinear
from gpntk.infinite.quadrature import Quadrature
from gpntk.infinite.trace import Program, trace

__all__ = [
    "ACTIVATIONS",
    "GELU",
    "ABReLU",
    "AbstractActivation",
    "Activation",
    "Erf",
    "Exponential",
    "Gaussian",
    "LayerMoments",
    "LocallyConnected",
    "Parametrization",
    "PiecewiseLinear",
    "Polynomial",
    "Program",
    "Quadrature",
    "RectifiedMonomial",
    "SampledKernels",
    "Sign",
    "Sine",
    "Step",
    "TiedAttention",
    "Weights",
    "activation_of",
    "cosine",
    "hermite",
    "monomial",
    "monte_carlo",
    "phases",
    "rbf",
    "trace",
]
