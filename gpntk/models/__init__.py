"""GP models on feature kernels."""

from gpntk.models.exact import TangentGP
from gpntk.models.laplace import LaplacePosterior
from gpntk.models.variational import VariationalGP, greedy_inducing_points

__all__ = ["LaplacePosterior", "TangentGP", "VariationalGP", "greedy_inducing_points"]
