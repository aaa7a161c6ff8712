"""What a label says: log p(y | f), its gradient and curvature, and the probabilities of a Gaussian f."""

from gpntk.likelihoods.links import LINKS, Latent, Link, probabilities
from gpntk.likelihoods.targets import DirichletTargets, dirichlet_targets, one_hot_targets

__all__ = ["LINKS", "DirichletTargets", "Latent", "Link", "dirichlet_targets", "one_hot_targets", "probabilities"]
