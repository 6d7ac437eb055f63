"""Learning rates that go on across a conversion."""

import keras
from keras import ops

from keras_upcycle import checks

WARMUPS = ("linear", "constant")


@keras.saving.register_keras_serializable(package="keras_upcycle")
class InverseSquareRoot(keras.optimizers.schedules.LearningRateSchedule):
    """Falls with the square root of the step, after a warm-up.

    After the warm-up, `learning_rate * sqrt(timescale / (step - warmup_steps +
    timescale))`; with the default timescale, that of T5, it is
    `learning_rate * sqrt(warmup_steps / step)`. The dense
    models of Sparse Upcycling were trained so, and their sparse selves went on
    without a break: the rate depends on the step alone, and
    `upcycle_optimizer` keeps the step. With `gradient_accumulation_steps`
    Keras counts batches here, not steps of the optimizer: multiply
    `warmup_steps`, `timescale` and those of a cool-down by it. There is no end
    to plan for; a linear cool-down can be put anywhere, also later
    (`with_cooldown`). Its factor, from 1 to 0, is on the rate of the formula,
    which goes on falling, as in `big_vision`; V-MoE's code lets the rate
    before it fall along a line.

    The vision models of Sparse Upcycling had `InverseSquareRoot(4e-4, 10_000,
    timescale=100_000)` and a cool-down over the last 50,000 steps.

    References: Raffel et al., T5 (arXiv 1910.10683), section 3.1.2; Zhai et
    al., Scaling Vision Transformers (arXiv 2106.04560), section 3.5, for the
    timescale and the cool-down, and their code, google-research/big_vision,
    `utils.create_learning_rate_schedule`, `decay_type="rsqrt"`; Sparse
    Upcycling (arXiv 2212.05055), section 2.1 and appendix A.

    Args:
        learning_rate: Float above 0, the highest rate, at `warmup_steps`.
        warmup_steps: Integer, at least 1: steps of the warm-up. Defaults to
            10,000.
        warmup: String. `"linear"` (default) rises from nothing; `"constant"`
            has the highest rate from the start, as T5 did: with a
            `learning_rate` of 0.01 and 10,000 steps that is T5's
            `1 / sqrt(max(step, 10000))`.
        timescale: Integer, at least 1, or `None`, in steps: that many after the
            warm-up the rate has fallen to `1 / sqrt(2)` of the highest.
            Defaults to `None`: `warmup_steps`.
        cooldown_start: Integer or float, at least 0, or `None`: the step at
            which a cool-down begins. Defaults to `None`: there is none.
        cooldown_steps: Integer, at least 1, or `None`: steps of the cool-down;
            the rate is 0 after. Defaults to `None`.

    Raises:
        TypeError, ValueError: For a setting outside its range, and for a
            cool-down of which only one of the two is given.

    Example:
        >>> schedule = InverseSquareRoot(0.1, warmup_steps=100)
        >>> [round(float(schedule(step)), 3) for step in (50, 100, 400)]
        [0.05, 0.1, 0.05]
        >>> vision = InverseSquareRoot(0.1, 100, timescale=1_000)
        >>> [round(float(vision(step)), 3) for step in (50, 100, 3_100)]
        [0.05, 0.1, 0.05]
        >>> cooling = schedule.with_cooldown(start=400, steps=10)
        >>> [round(float(cooling(step)), 3) for step in (400, 405, 410)]
        [0.05, 0.025, 0.0]
    """

    def __init__(
        self,
        learning_rate,
        warmup_steps=10_000,
        *,
        warmup="linear",
        timescale=None,
        cooldown_start=None,
        cooldown_steps=None,
    ):
        learning_rate = checks.check_factor("learning_rate", learning_rate)
        warmup_steps = checks.check_count("warmup_steps", warmup_steps)
        warmup = checks.check_choice("warmup", warmup, WARMUPS)
        if timescale is not None:
            timescale = checks.check_count("timescale", timescale)
        if (cooldown_start is None) != (cooldown_steps is None):
            raise ValueError(
                "A cool-down needs `cooldown_start` and `cooldown_steps`. "
                f"Received: cooldown_start={cooldown_start}, "
                f"cooldown_steps={cooldown_steps}. Pass both or neither."
            )
        if cooldown_steps is not None:
            cooldown_start = checks.check_number(
                "cooldown_start", cooldown_start, at_least=0
            )
            cooldown_steps = checks.check_count(
                "cooldown_steps", cooldown_steps
            )
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.warmup = warmup
        self.timescale = timescale
        self.cooldown_start = cooldown_start
        self.cooldown_steps = cooldown_steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        late = ops.maximum(step, float(self.warmup_steps))
        timescale = self.timescale or self.warmup_steps
        late = late + float(timescale - self.warmup_steps)
        rate = self.learning_rate * ops.sqrt(timescale / late)
        if self.warmup == "linear":
            rate = rate * ops.minimum(step / self.warmup_steps, 1.0)
        if self.cooldown_steps is not None:
            left = self.cooldown_start + self.cooldown_steps - step
            rate = rate * ops.clip(left / self.cooldown_steps, 0.0, 1.0)
        return rate

    def with_cooldown(self, start: int, steps: int) -> "InverseSquareRoot":
        """The same schedule with a cool-down, the same up to its start.

        For a model whose training is to end: compile it with an optimizer
        whose `learning_rate` is this.

        Args:
            start: Integer or float, at least 0: the step at which the rate
                begins to fall to 0.
            steps: Integer, at least 1: how many steps that takes.

        Returns:
            A new schedule.

        Raises:
            TypeError, ValueError: For a number outside its range.
        """
        return InverseSquareRoot(
            **{
                **self.get_config(),
                "cooldown_start": start,
                "cooldown_steps": steps,
            }
        )

    def get_config(self):
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "warmup": self.warmup,
            "timescale": self.timescale,
            "cooldown_start": self.cooldown_start,
            "cooldown_steps": self.cooldown_steps,
        }
