"""GP models on feature kernels, and what turns them into classifiers."""

from gpntk.models.classification import DirichletTargets, dirichlet_targets, one_hot_targets
from gpntk.models.laplace import LaplacePosterior
from gpntk.models.links import LINKS, Latent, Link, probabilities
from gpntk.models.regression import TangentGP
from gpntk.models.variational import VariationalGP, greedy_inducing_points

__all__ = [
    "LINKS",
    "DirichletTargets",
    "LaplacePosterior",
    "Latent",
    "Link",
    "TangentGP",
    "VariationalGP",
    "dirichlet_targets",
    "greedy_inducing_points",
    "one_hot_targets",
    "probabilities",
]
