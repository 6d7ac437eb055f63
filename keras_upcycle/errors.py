"""The one error class that is ours."""


class UpcycleError(ValueError):
    """The surgery cannot be done on this model.

    Raised before anything is built, so the donor is as it was and no
    half-converted model exists. The message says what was looked for, what
    was found and what to do. A `ValueError`, so that `except ValueError`
    around a conversion catches it too.

    Example:
        >>> dense = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
        >>> try:
        ...     keras_upcycle.upcycle_model(dense, 4)
        ... except UpcycleError:
        ...     print("No block to convert.")
        No block to convert.
    """
