"""What a user's functions give: checked, and named where they fail."""

import contextlib

import keras
import numpy as np
from keras import ops

from keras_upcycle import checks
from keras_upcycle.errors import UpcycleError

STACKED = "a leading axis for the experts"


def checked_tensor(
    value, shapes, dtype, shape, argument, place, meaning=STACKED
):
    """A user's value as a tensor of our own; raises unless it can be one."""
    received = checks.dtype_name(value)
    if "float" not in received:  # "bfloat16" too
        raise TypeError(
            f"`{argument}` must give floats. Received: values of dtype "
            f"{received} for {place}. Return an array such as "
            '`values.astype("float32")`.'
        )
    if not hasattr(value, "shape"):
        value = np.asarray(value)
    got = tuple(value.shape)
    shapes = {tuple(each) for each in shapes}
    if got not in shapes:
        expected = " or ".join(str(each) for each in sorted(shapes, key=len))
        raise UpcycleError(
            f"`{argument}` must give values of shape {expected}, {meaning}. "
            f"Received: shape {got} for {place}. Reshape what it returns."
        )
    # A copy: two blocks may be given one array, the donor's own among them,
    # and on torch a NumPy array's memory would be the weight's.
    made = ops.copy(ops.reshape(ops.cast(value, dtype), shape))
    if not bool(ops.all(ops.isfinite(made))):
        raise UpcycleError(
            f"`{argument}` must give finite values. Received: NaN or infinity "
            f"in {place}, which is finite in the dense model. Look for a "
            "division by zero, or for values too large for "
            f"{keras.backend.standardize_dtype(made.dtype)}."
        )
    return made


@contextlib.contextmanager
def telling_where(argument, place):
    """Says of an error of the user's own where it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"Raised by `{argument}` for {place}.")
        raise
