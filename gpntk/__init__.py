"""Turn a trained PyTorch network into a Gaussian process: f(x; w + d) = f(x; w) + J(x) d, d ~ N(0, S)."""

from gpntk import errors as errors
from gpntk.dynamics import GradientFlow as GradientFlow
from gpntk.estimators import TransferClassifier as TransferClassifier
from gpntk.estimators import TransferRegressor as TransferRegressor
from gpntk.jacobians import AutoBackend as AutoBackend
from gpntk.jacobians import AutodiffBackend as AutodiffBackend
from gpntk.jacobians import Choice as Choice
from gpntk.jacobians import DenseBackend as DenseBackend
from gpntk.jacobians import StructuredBackend as StructuredBackend
from gpntk.kernels import InfiniteNNGPKernel as InfiniteNNGPKernel
from gpntk.kernels import InfiniteNTKKernel as InfiniteNTKKernel
from gpntk.kernels import NNGPKernel as NNGPKernel
from gpntk.kernels import NTKKernel as NTKKernel
from gpntk.kernels import SketchedNTKKernel as SketchedNTKKernel
from gpntk.means import NetworkMean as NetworkMean
from gpntk.network import FrozenNetwork as FrozenNetwork
from gpntk.network import freeze as freeze
from gpntk.operators import FeatureGramLinearOperator as FeatureGramLinearOperator
from gpntk.operators import JacobianLinearOperator as JacobianLinearOperator
from gpntk.operators import NoisyGramLinearOperator as NoisyGramLinearOperator
from gpntk.transfer import TransferGP as TransferGP

__version__ = "0.1.0"
