"""One file per family of functions: how products with the Jacobian of their parameters are computed."""

from gpntk.jacobians.rules.conv import ConvRule
from gpntk.jacobians.rules.elementwise import ElementwiseRule
from gpntk.jacobians.rules.embedding import EmbeddingRule
from gpntk.jacobians.rules.linear import LinearRule
from gpntk.jacobians.rules.rule import AbstractLayerRule, Binding, Factors, Operations, bind, register
from gpntk.jacobians.rules.weight_sharing import sketched

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
