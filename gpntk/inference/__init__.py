"""Exact GP inference on Jacobian features: systems, solvers, preconditioners, evidence and posteriors. Pure torch."""

from gpntk.inference.auto import AutoSolver, largest_dense
from gpntk.inference.covariance import AbstractCovariance, DenseCovariance, FeatureCovariance
from gpntk.inference.direct import FunctionSpace, WeightSpace
from gpntk.inference.evidence import inv_quad_logdet, log_evidence
from gpntk.inference.factors import AbstractFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.features import AbstractFeatures, Features
from gpntk.inference.inverse import AbstractInverse, LogDet
from gpntk.inference.iterative import ConjugateGradients
from gpntk.inference.outcome import Outcome, SolveResult
from gpntk.inference.posterior import Posterior
from gpntk.inference.preconditioners import AbstractPreconditioner, Nystrom, PivotedCholesky, SampledGram
from gpntk.inference.sharded import ShardedFeatures
from gpntk.inference.solver import AbstractSolver, SolverChoice
from gpntk.inference.spectral import SpectralFit, SpectralMarginalLikelihood
from gpntk.inference.streamed import StreamedFeatures, targets
from gpntk.inference.system import WhitenedSystem

__all__ = [
    "AbstractCovariance",
    "AbstractFactor",
    "AbstractFeatures",
    "AbstractInverse",
    "AbstractPreconditioner",
    "AbstractSolver",
    "AutoSolver",
    "CholeskyFactor",
    "ConjugateGradients",
    "DenseCovariance",
    "FeatureCovariance",
    "Features",
    "FunctionSpace",
    "LogDet",
    "Nystrom",
    "Outcome",
    "PivotedCholesky",
    "Posterior",
    "SampledGram",
    "ShardedFeatures",
    "SolveResult",
    "SolverChoice",
    "SpectralFactor",
    "SpectralFit",
    "SpectralMarginalLikelihood",
    "StreamedFeatures",
    "WeightSpace",
    "WhitenedSystem",
    "inv_quad_logdet",
    "largest_dense",
    "log_evidence",
    "targets",
]
