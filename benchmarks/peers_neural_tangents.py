"""neural-tangents on JAX, jitted, in an environment without torch and without TensorFlow."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.peers import SEED, case_of_this_process, inputs, measure, mlp_gram, mlp_weights, normal, report

# The experimental part needs TensorFlow and tf2jax, gigabytes that nothing here uses; an empty module takes its place.
sys.modules["neural_tangents.experimental"] = ModuleType("neural_tangents.experimental")
import neural_tangents as nt  # noqa: E402

Weights = list[tuple[Array, Array]]


def network(weights: Weights, x: Array) -> Array:
    """The MLP, f(x; w) `[N, 1]`."""
    for weight, bias in weights[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = weights[-1]
    return x @ weight + bias


@jax.jit
def product(weights: Weights, x: Array, v: Array) -> Array:
    """K V `[N, k]` by ``empirical_ntk_vp_fn``, columns by vmap; x is an argument, so that nothing is folded away."""
    times = nt.empirical_ntk_vp_fn(network, x, None, weights)
    return times(v) if v.shape[1] == 1 else jax.vmap(times, in_axes=1, out_axes=1)(v[:, :, None])[..., 0]


def gram() -> Callable[[Weights, Array], Array]:
    """The dense K `[N, N]` by structured derivatives, which beat the default Jacobian contraction by far on an MLP."""
    kernel = nt.empirical_ntk_fn(
        network, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation.STRUCTURED_DERIVATIVES
    )
    return jax.jit(lambda weights, x: kernel(x, None, weights)[..., 0, 0])


def main() -> None:
    """Measure this process's case and print its row."""
    case, _ = case_of_this_process()
    weights = [(jnp.asarray(weight.T), jnp.asarray(bias)) for weight, bias in mlp_weights()]
    x = inputs(case, SEED + 1)
    v = normal((case.rows, case.columns), SEED)
    function = partial(product, weights, v=jnp.asarray(v)) if case.columns else partial(gram(), weights)
    given = jnp.asarray(x).block_until_ready()

    def prepare(seed: int) -> Array:
        return given if case.inputs == "same" else jnp.asarray(inputs(case, seed)).block_until_ready()

    figures = measure(lambda x: function(x).block_until_ready(), prepare)
    exact = mlp_gram(x) @ v if case.columns else mlp_gram(x)
    report(case, figures, np.asarray(function(given)), exact)


if __name__ == "__main__":
    main()
