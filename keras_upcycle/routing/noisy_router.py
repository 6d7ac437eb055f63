"""What routers share that add noise to their logits in training."""

import functools
from typing import Any

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.routing import schedules
from keras_upcycle.routing.router import Router
from keras_upcycle.types import Tensor


class NoisyRouter(Router):
    """A router that adds noise to its logits in training.

    Args:
        noise_stddev: Standard deviation of the Gaussian noise; 0 for none. Or a
            schedule of it.
        seed: Seed of the noise; `None` draws one.
        **kwargs: As for `Router`.
    """

    may_follow = (*Router.may_follow, "noise_stddev")

    def __init__(self, *, noise_stddev=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.noise_stddev = schedules.check(
            "noise_stddev",
            noise_stddev,
            functools.partial(checks.check_number, at_least=0.0),
        )
        self.seed = checks.check_seed("seed", seed)
        if self.noise_stddev:
            self.noise_seed = keras.random.SeedGenerator(self.seed)

    def noisy(self, logits: Tensor, training: Any) -> Tensor:
        """The logits with this call's noise; themselves at inference.

        Args:
            logits: Tensor, float32 `(G, S, E)`, divided by the temperature.
            training: Boolean, whether the model trains.
        """
        if not training or not self.noise_stddev:
            return logits
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.noise_seed
        )
        return logits + self.stddev_of_logits() * noise

    def stddev_of_logits(self) -> Any:
        """The standard deviation of the noise on what `choose` is given.

        `(z + n) / T` is `z / T` with a noise of `noise_stddev / T`.
        """
        stddev = self.setting("noise_stddev")
        if schedules.is_one(self.temperature):
            return stddev
        return stddev / self.setting("temperature")

    def get_config(self):
        return {
            **super().get_config(),
            "noise_stddev": schedules.in_config(self.noise_stddev),
            "seed": self.seed,
        }
