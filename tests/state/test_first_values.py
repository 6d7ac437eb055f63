"""First values under a distribution, which compiles large ones' initializers.

The distribution needs eight devices, and so a process of its own:
`distributed_conversion.py`.
"""

import keras
import numpy as np
import pytest
from places import gaps_in, run_script

from keras_upcycle.state import first_values


def test_without_a_layout_it_is_the_function():
    ones = first_values.laid_out(lambda shape, dtype=None: np.ones(shape))
    assert isinstance(ones, keras.initializers.Initializer)
    np.testing.assert_array_equal(
        ones((2, 3), dtype="float32"), np.ones((2, 3))
    )


def test_an_initializer_that_takes_a_layout_is_left_alone():
    ones = first_values.laid_out(lambda shape, dtype=None: np.ones(shape))
    assert first_values.laid_out(ones) is ones


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "jax",
    reason="keras.distribution lays variables out on JAX alone",
)
def test_large_variables_convert_under_a_distribution():
    gaps = gaps_in(run_script("distributed_conversion.py"))
    assert {name for name, _ in gaps} >= {
        *("copy", "densify", "prune", "vit"),
        *("copy spread as on one device", "random spread as on one device"),
    }
    assert [(name, gap) for name, gap in gaps if gap > 1e-5] == []
