"""How much a recorded JAX program multiplies."""

import math


def products_in(model, inputs, training=True):
    """Operations of the matrix products and convolutions of one call."""
    import jax.extend

    def call(inputs):
        return model(inputs, training=training)

    def count(program):
        total = 0
        for equation in program.eqns:
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                total += count(inner)
            out = math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                left = equation.invars[0].aval.shape
                total += 2 * out * math.prod(left[axis] for axis in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval.shape  # filters come last
                total += 2 * out * math.prod(kernel[:-1])
        return total

    return count(jax.make_jaxpr(call)(inputs).jaxpr)
