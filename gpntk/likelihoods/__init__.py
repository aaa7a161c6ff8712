"""What a label says: log p(y | f), its gradient and curvature, and the probabilities of a Gaussian f."""

from gpntk.likelihoods.likelihood import AbstractLikelihood, Bernoulli, Categorical, Gaussian, Poisson
from gpntk.likelihoods.links import LINKS, Latent, Link, probabilities
from gpntk.likelihoods.targets import DirichletTargets, dirichlet_targets, one_hot_targets

__all__ = [
    "LINKS",
    "AbstractLikelihood",
    "Bernoulli",
    "Categorical",
    "DirichletTargets",
    "Gaussian",
    "Latent",
    "Link",
    "Poisson",
    "dirichlet_targets",
    "one_hot_targets",
    "probabilities",
]
