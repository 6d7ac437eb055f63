"""What may be set on a `MoEFeedForward` that is built: dropout, remat."""

import keras

from keras_upcycle import checks, keras_internals


class SetWhenBuilt(keras.layers.Layer):
    """Dropout and rematerialisation of a `MoEFeedForward`, set at any time."""

    @property
    def remat(self) -> bool:
        """Whether training recomputes hidden layers; may be set any time.

        A compiled step keeps what it was compiled with: set it before `fit`,
        or call `compile` again.
        """
        return self.experts.remat

    @remat.setter
    def remat(self, value: bool) -> None:
        value = checks.check_flag("remat", value)
        for networks in self.networks:
            networks.remat = value

    def set_dropout(
        self, hidden: float | None = None, output: float | None = None
    ) -> None:
        """Other rates for a layer that is built already, from 0 too.

        A compiled step keeps its rates; `set_dropout` of a model drops it.

        Args:
            hidden: Float in `[0, 1)` or `None`, the rate on the networks'
                hidden layers; `None` (default) leaves it.
            output: Float in `[0, 1)` or `None`, the rate on the output; `None`
                (default) leaves it.

        Raises:
            TypeError, ValueError: For what is no such rate, before anything
                is changed.
        """
        if hidden is not None:
            hidden = checks.check_rate("hidden", hidden)
        if output is not None:
            output = checks.check_rate("output", output)
        if hidden is not None:
            self.dropout = hidden
            for networks in self.networks:
                networks.set_dropout(hidden)
        if output is None:
            return
        self.output_dropout = output
        if self.output_drop is not None:
            keras_internals.set_rate(self.output_drop, output)
        elif output:
            keras_internals.add_dropout(
                self, "output_drop", self._made_output_dropout()
            )

    def _made_output_dropout(self):
        rate, dtype = self.output_dropout, self.dtype_policy
        return keras.layers.Dropout(rate, dtype=dtype, name="output_dropout")
