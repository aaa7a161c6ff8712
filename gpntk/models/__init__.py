"""GP models on feature kernels."""

from gpntk.models.laplace import LaplacePosterior
from gpntk.models.regression import TangentGP
from gpntk.models.variational import VariationalGP, greedy_inducing_points

__all__ = ["LaplacePosterior", "TangentGP", "VariationalGP", "greedy_inducing_points"]
