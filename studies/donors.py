"""Mixtures whose experts are other models: trained first, and paid for."""

from collections.abc import Callable

import keras
import numpy as np

import keras_upcycle as ku
from keras_upcycle.demo import training
from studies.arms import Arm
from studies.language import Language

DOMAINS = 4  # parts of the text, and dense models trained apart on them
SAMPLES = 256  # windows that UpIT sorts and trains its routing vectors on


def branch_train_mix(
    setting: Language, arm: Arm, seed: int, dense: keras.Model
) -> keras.Model:
    """Copies of the checkpoint, each trained on one part of the text, mixed.

    Half of the extra compute goes into them.

    Args:
        setting: The text, and the dense model.
        arm: The arm; `before` is what the branches cost together.
        seed: Of everything that is drawn.
        dense: A compiled dense model in the checkpoint's state; ends in it.
    """
    start = training.get_state(dense)
    branches = []
    for part in np.array_split(setting.text.train, DOMAINS):
        training.set_state(dense, start)
        training.fit(
            dense,
            setting.batches_of(part, seed, arm.checkpoint),
            training.rates(arm.before_rate, arm.before // DOMAINS),
        )
        branch = setting.build()
        branch.set_weights(dense.get_weights())
        branches.append(branch)
    training.set_state(dense, start)
    options = {**arm.options(), "expert_init": ku.BranchTrainMix(branches)}
    return ku.upcycle_model(dense, seed=seed, **options)


def upit(
    setting: Language, arm: Arm, seed: int, dense: keras.Model
) -> keras.Model:
    """Checkpoints of the dense model's own continuation, expanded.

    Args:
        setting: The text, and the dense model.
        arm: The arm; `before` is what tuning, sorting and vectors cost.
        seed: Of everything that is drawn.
        dense: A compiled dense model in the checkpoint's state; ends tuned.
    """
    base = ku.ExpertWeights.from_model(dense)
    length = setting.shape.length
    # The routing vectors' samples, run by every expert, and their training.
    vectors = SAMPLES * arm.experts // (
        3 * setting.batch_size
    ) + 4 * SAMPLES // (setting.batch_size)
    steps = (arm.before - vectors) // training.STRETCH * training.STRETCH
    checkpoints = ku.ExpertCheckpoints(every_steps=steps // 4)
    setting.fit(
        dense,
        training.rates(arm.before_rate, steps),
        seed=seed,
        start=arm.checkpoint,
        callbacks=[checkpoints],
    )
    at = np.random.default_rng(seed).integers(
        0, len(setting.text.train) - length - 1, SAMPLES
    )
    options = arm.options()
    return ku.upit_upcycle(
        dense,
        arm.experts,
        checkpoints.experts,
        training.windows(setting.text.train, at, length),
        base=base,
        router=options["router"],
        layers=arm.layers,
        seed=seed,
        verbose=0,
    )


MAKERS: dict[str, Callable[..., keras.Model]] = {
    "branch_train_mix": branch_train_mix,
    "upit": upit,
}
