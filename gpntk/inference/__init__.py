"""Exact GP inference on Jacobian features: systems, solvers, preconditioners, evidence and posteriors. Pure torch."""

from gpntk.inference.auto import AutoSolver, SolverChoice
from gpntk.inference.direct import FunctionSpace, WeightSpace
from gpntk.inference.evidence import inv_quad_logdet, log_marginal_likelihood
from gpntk.inference.factors import AbstractFactor, CholeskyFactor, SpectralFactor
from gpntk.inference.features import AbstractFeatures, Features
from gpntk.inference.inverse import AbstractInverse, LogDet
from gpntk.inference.iterative import ConjugateGradients
from gpntk.inference.outcome import Outcome, SolveResult
from gpntk.inference.posterior import Posterior
from gpntk.inference.preconditioners import AbstractPreconditioner, Nystrom, PivotedCholesky, SampledGram
from gpntk.inference.sharded import ShardedFeatures
from gpntk.inference.solver import AbstractSolver
from gpntk.inference.spectral import SpectralFit, SpectralMarginalLikelihood
from gpntk.inference.streamed import StreamedFeatures, targets
from gpntk.inference.system import NoisySystem

__all__ = [
    "AbstractFactor",
    "AbstractFeatures",
    "AbstractInverse",
    "AbstractPreconditioner",
    "AbstractSolver",
    "AutoSolver",
    "CholeskyFactor",
    "ConjugateGradients",
    "Features",
    "FunctionSpace",
    "LogDet",
    "NoisySystem",
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
    "inv_quad_logdet",
    "log_marginal_likelihood",
    "targets",
]
