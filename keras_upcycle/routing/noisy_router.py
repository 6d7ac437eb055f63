"""What routers share that add noise to their logits in training."""

from typing import Any

import keras
from keras import ops

from keras_upcycle import checks
from keras_upcycle.routing.router import Router
from keras_upcycle.types import Tensor


class NoisyRouter(Router):
    """A router that adds noise to its logits in training.

    Args:
        noise_stddev: Standard deviation of the Gaussian noise; 0 for none.
        seed: Seed of the noise; `None` draws one.
        **kwargs: As for `Router`.
    """

    def __init__(self, *, noise_stddev=0.0, seed=None, **kwargs):
        super().__init__(**kwargs)
        self.noise_stddev = checks.check_number(
            "noise_stddev", noise_stddev, at_least=0.0
        )
        self.seed = checks.check_seed("seed", seed)
        if self.noise_stddev:
            self.noise_seed = keras.random.SeedGenerator(self.seed)

    def noisy(self, logits: Tensor, training: Any) -> Tensor:
        """The logits with this call's noise; themselves at inference."""
        if not training or not self.noise_stddev:
            return logits
        noise = keras.random.normal(
            ops.shape(logits), dtype="float32", seed=self.noise_seed
        )
        return logits + self.noise_stddev * noise

    def get_config(self):
        return {
            **super().get_config(),
            "noise_stddev": self.noise_stddev,
            "seed": self.seed,
        }
