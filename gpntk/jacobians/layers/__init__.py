"""One file per family of functions: how products with the Jacobian of their parameters are computed."""

from gpntk.jacobians.layers.conv import ConvRule
from gpntk.jacobians.layers.elementwise import ElementwiseRule
from gpntk.jacobians.layers.embedding import EmbeddingRule
from gpntk.jacobians.layers.linear import LinearRule
from gpntk.jacobians.layers.positions import sketched
from gpntk.jacobians.layers.rule import AbstractLayerRule, Binding, Factors, Operations, bind, register

__all__ = [
    "AbstractLayerRule",
    "Binding",
    "ConvRule",
    "ElementwiseRule",
    "EmbeddingRule",
    "Factors",
    "LinearRule",
    "Operations",
    "bind",
    "register",
    "sketched",
]
