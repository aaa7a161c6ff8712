"""One file per layer family: how products with the Jacobian of that layer's parameters are computed."""

from gpntk.jacobians.layers.linear import LinearRule
from gpntk.jacobians.layers.rule import AbstractLayerRule, Factors, rule_for

__all__ = ["AbstractLayerRule", "Factors", "LinearRule", "rule_for"]
