"""One file per family of functions: how products with the Jacobian of their parameters are computed."""

from gpntk.jacobians.rules.bilinear import BilinearRule
from gpntk.jacobians.rules.conv import ConvRule
from gpntk.jacobians.rules.elementwise import ElementwiseRule
from gpntk.jacobians.rules.embedding import EmbeddingRule
from gpntk.jacobians.rules.linear import LinearRule
from gpntk.jacobians.rules.rule import (
    AbstractLayerRule,
    Binding,
    Factors,
    RuleSizes,
    bind,
    gram_of_gradients,
    inner_products,
    register,
    weighted,
)

__all__ = [
    "AbstractLayerRule",
    "BilinearRule",
    "Binding",
    "ConvRule",
    "ElementwiseRule",
    "EmbeddingRule",
    "Factors",
    "LinearRule",
    "RuleSizes",
    "bind",
    "gram_of_gradients",
    "inner_products",
    "register",
    "weighted",
]
