"""Lazy linear operators made of Jacobian products, for GPyTorch and for direct use."""

from gpntk.operators.feature_gram import FeatureGramLinearOperator
from gpntk.operators.jacobian import JacobianLinearOperator
from gpntk.operators.noisy_gram import NoisyGramLinearOperator

__all__ = ["FeatureGramLinearOperator", "JacobianLinearOperator", "NoisyGramLinearOperator"]
