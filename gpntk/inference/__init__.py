"""Exact GP inference on Jacobian features: systems, solvers, preconditioners, evidence and posteriors. Pure torch."""

from gpntk.inference.auto import AutoSolver
from gpntk.inference.covariance import FeatureCovariance
from gpntk.inference.dense_covariance import DenseCovariance
from gpntk.inference.direct import FunctionSpace, WeightSpace
from gpntk.inference.evidence import log_evidence
from gpntk.inference.features import Features
from gpntk.inference.iterative import ConjugateGradients
from gpntk.inference.outcome import Outcome
from gpntk.inference.posterior import Posterior
from gpntk.inference.preconditioners import Nystrom, SampledGram
from gpntk.inference.sharded import ShardedFeatures
from gpntk.inference.solver import AbstractSolver
from gpntk.inference.streamed import StreamedFeatures, targets
from gpntk.inference.system import WhitenedSystem

__all__ = [
    "AbstractSolver",
    "AutoSolver",
    "ConjugateGradients",
    "DenseCovariance",
    "FeatureCovariance",
    "Features",
    "FunctionSpace",
    "Nystrom",
    "Outcome",
    "Posterior",
    "SampledGram",
    "ShardedFeatures",
    "StreamedFeatures",
    "WeightSpace",
    "WhitenedSystem",
    "log_evidence",
    "targets",
]
