"""What is compared: ways to go on from a dense checkpoint."""

import dataclasses
from typing import Any

import keras_upcycle as ku  # before keras: chooses the backend

# isort: split
import keras

DENSE, UPCYCLED, SCRATCH = "dense", "upcycled", "scratch"
OPERATIONS, TIME = "operations", "time"
FAMILY = "family"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to spend compute.

    Attributes:
        kind: `DENSE` goes on with the checkpoint as it is, `UPCYCLED` as a
            mixture, `SCRATCH` trains the same mixture from random weights.
        learning_rate: Of the part before the cool-down.
        variant: In the tables; what differs from the others.
        checkpoint: Steps of the dense checkpoint.
        checkpoint_rate: Its learning rate.
        experts: Of each mixture.
        layers: Which feed-forwards become mixtures, as for `upcycle_model`.
        router: A key of `ROUTERS`, or `FAMILY`: what a model's family takes
            by itself.
        top_k: Experts a token.
        capacity_factor: Of the router; `None` drops nothing.
        normalize: Whether combine weights are rescaled to sum to 1.
        load_balance_loss: Of the router.
        noise_stddev: Of the router.
        slots: The optimizer's: `"rescaled"`, `"carried"` as they are, or
            `"new"`; `"fresh"` is an Adam that knows nothing, for slices of
            the dense block.
        expert_init: A key of `INITS`.
        attention: `True` if heads of attention are experts too.
        before: Dense steps' worth of the extra compute that is spent before
            there is a mixture, on the models that it is made of.
        before_rate: Learning rate of that.
        equal: What is equal at the same extra compute: `OPERATIONS` or
            `TIME`.
    """

    kind: str
    learning_rate: float = 1e-2
    variant: str = ""
    checkpoint: int = 3000
    checkpoint_rate: float = 1e-2
    experts: int = 16
    layers: tuple[int, ...] | str = (1,)
    router: str = "top_k"
    top_k: int = 2
    capacity_factor: float | None = 1.25
    normalize: bool = True
    load_balance_loss: float = 0.01
    noise_stddev: float = 0.0
    slots: str = "rescaled"
    expert_init: str = "copy"
    attention: bool | None = None
    before: int = 0
    before_rate: float = 3e-3
    equal: str = OPERATIONS

    def options(self) -> dict[str, Any]:
        """Arguments of `upcycle_model`, but for the seed and the donors."""
        options = {
            "num_experts": self.experts,
            "layers": self.layers,
            "expert_init": INITS[self.expert_init](),
        }
        if self.router != FAMILY:
            options["router"] = ROUTERS[self.router](self)
        if self.attention:
            options["attention"] = True
        return options

    def shape(self) -> tuple:
        """Arms with the same shape can share one compiled model."""
        left_out = (
            "learning_rate",
            "variant",
            "checkpoint",
            "checkpoint_rate",
            "equal",
        )
        return tuple(
            value
            for name, value in dataclasses.asdict(self).items()
            if name not in left_out
        )


def _top_k(arm, kind=ku.TopKRouter, **settings):
    return kind(
        arm.top_k,
        capacity_factor=arm.capacity_factor,
        load_balance_loss=arm.load_balance_loss,
        noise_stddev=arm.noise_stddev,
        **settings,
    )


ROUTERS = {
    "top_k": lambda arm: _top_k(arm, normalize=arm.normalize),
    "default_moe": lambda arm: _top_k(arm, ku.DefaultMoERouter),
    "expert_choice": lambda arm: ku.ExpertChoiceRouter(
        capacity_factor=arm.capacity_factor, noise_stddev=arm.noise_stddev
    ),
    "ds_moe": lambda arm: ku.DSMoERouter(mutual_information_loss=6.3e-4),
    "dense_mixer": lambda arm: _top_k(arm, router_gradient="dense_mixer"),
    # Over most of the headline's steps.
    "annealed": lambda arm: _top_k(
        arm,
        temperature=keras.optimizers.schedules.PolynomialDecay(4.0, 400, 1.0),
    ),
    "skywork": lambda arm: _top_k(arm, ku.SkyworkRouter),
}

# What `donors` makes has the shape of copies.
INITS = {
    "branch_train_mix": lambda: "copy",
    "upit": lambda: "copy",
    "copy": lambda: "copy",
    "drop_upcycling": lambda: ku.DropUpcycling(),
    "random_noise": lambda: ku.RandomNoise(),
    "shared_experts": lambda: ku.SharedExperts(),
    "virtual_groups": lambda: ku.VirtualGroups(4),
    "slices": lambda: "feed_forward_slices",
    "low_rank": lambda: ku.LowRankExperts(8),
}
