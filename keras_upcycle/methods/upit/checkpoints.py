"""Step 1: experts are collected while a dense model is tuned."""

import math
import os
import pathlib
import re

import keras

from keras_upcycle import atomic_files, checks, keras_internals
from keras_upcycle.methods.expert_weights import ExpertWeights

_FILE = "expert_step_{:09d}.npz"
_PATTERN = re.compile(r"expert_step_(\d+)\.npz")


class ExpertCheckpoints(keras.callbacks.Callback):
    """Keeps the feed-forward weights of a dense model at fixed intervals.

    Between these moments it costs nothing: weights are read when one is due
    only, so on JAX steps go on running asynchronously. Its clock is the
    optimizer's step count: a run that goes on from a backup goes on in its
    list, and forgets what it had collected after the step where it goes on;
    one that starts at step 0 starts the list, and the folder's, anew.

    References: UpIT (arXiv 2410.01610), expert preparation.

    Args:
        every: Float above 0, the interval in epochs. Defaults to 0.25, the
            paper's.
        every_steps: Integer, at least 1, or `None`: the interval in steps,
            which takes the place of `every`. With `steps_per_execution` a
            checkpoint is taken at the end of the execution in which it falls
            due. Defaults to `None`.
        directory: Path of the folder of the files, made if it is missing, each
            written whole or not at all. `None` (default) keeps experts in
            memory.
        model: A Keras model, the dense one to read, where `fit` trains another
            one around it that shares its weights. Defaults to the one that
            trains.
        other_weights: Boolean, whether to keep the weights outside feed-forward
            blocks too, for `UpIT(other_weights="last")` or `"average"`.
            Defaults to `False`.

    Attributes:
        steps: For each expert, after how many training steps it was taken.
        experts: List of `ExpertWeights`, in that order; from a directory they
            are read anew each time.

    Raises:
        TypeError, ValueError: For a setting outside its range; when training
            starts, if `every` is given and the number of steps of an epoch is
            not known.
        UpcycleError: When training starts, if the model is sparse or has no
            feed-forward block.

    Example:
        >>> dense = keras.Sequential([
        ...     keras.Input((8,)),
        ...     keras.layers.Dense(16, activation="relu"),
        ...     keras.layers.Dense(8),
        ... ])
        >>> dense.compile("adam", "mse")
        >>> checkpoints = ExpertCheckpoints(every=0.5)
        >>> x = np.ones((8, 8))
        >>> history = dense.fit(
        ...     x, x, batch_size=2, verbose=0, callbacks=[checkpoints],
        ... )
        >>> checkpoints.steps
        [2, 4]
        >>> len(checkpoints.experts)
        2
    """

    def __init__(
        self,
        every: float = 0.25,
        *,
        every_steps: int | None = None,
        directory: str | os.PathLike | None = None,
        model: keras.Model | None = None,
        other_weights: bool = False,
    ):
        super().__init__()
        if every_steps is None:
            every = checks.check_factor("every", every)
        else:
            every_steps = checks.check_count("every_steps", every_steps)
        if directory is not None:
            _check_folder(directory)
        if model is not None:
            checks.check_instance(
                "model", model, keras.Model, "the dense Keras model to read"
            )
        self.every = every
        self.every_steps = every_steps
        self.directory = None if directory is None else pathlib.Path(directory)
        self.dense = model
        self.other_weights = checks.check_flag("other_weights", other_weights)
        # Only reads weights, at moments when Keras has them in place.
        self.async_safe = True
        self._kept: dict[int, ExpertWeights] = {}
        self._resumed = False

    @property
    def steps(self) -> list[int]:
        """After how many steps each expert was taken."""
        if self.directory is None:
            return sorted(self._kept)
        return sorted(_files(self.directory))

    @property
    def experts(self) -> list[ExpertWeights]:
        """The experts, earliest first."""
        if self.directory is None:
            return [self._kept[step] for step in self.steps]
        return self.load(self.directory)

    @staticmethod
    def load(directory: str | os.PathLike) -> list[ExpertWeights]:
        """The experts of a folder that a run wrote, earliest first.

        Args:
            directory: Path of the folder.

        Raises:
            TypeError: If `directory` is no path.
            NotADirectoryError: If it is that of a file.
        """
        _check_folder(directory)
        found = _files(pathlib.Path(directory))
        return [ExpertWeights.load(found[step]) for step in sorted(found)]

    def on_train_begin(self, logs=None):
        if self.every_steps is None and not self.params.get("steps"):
            raise ValueError(
                "An interval in epochs needs to know how long an epoch is. "
                f"Received: every={self.every} and a data set of unknown "
                "length. Pass `every_steps`, or `steps_per_epoch` to `fit`."
            )
        ExpertWeights.view(self._source())  # raises before the first step
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            atomic_files.clean(self.directory, _PATTERN.pattern)
        self._resumed = False

    def on_epoch_begin(self, epoch, logs=None):
        self._start = self._step()
        self._taken = self._count(self._start)
        if self._resumed:
            return
        self._resumed = True
        for step in [s for s in self.steps if s > self._start]:
            self._forget(step)
        if self._start == 0:
            for step in self.steps:
                self._forget(step)

    def on_train_batch_begin(self, batch, logs=None):
        # Here and not at a batch's end, where Keras may run callbacks in a
        # thread beside the next step.
        self._take_if_due(self._start + batch)

    def on_epoch_end(self, epoch, logs=None):
        self._take_if_due(self._step())

    def _take_if_due(self, step):
        count = self._count(step)
        if count <= self._taken:
            return
        self._taken = count
        keras_internals.sync_state(self.model)
        expert = ExpertWeights.from_model(
            self._source(),
            other_weights=self.other_weights,
            description=f"step {step}",
        )
        if self.directory is None:
            self._kept[step] = expert
        else:
            expert.save(self.directory / _FILE.format(step))

    def _forget(self, step):
        if self.directory is None:
            del self._kept[step]
        else:
            _files(self.directory)[step].unlink()

    def _count(self, step):
        """How many checkpoints are due by a step."""
        if self.every_steps is not None:
            return step // self.every_steps
        return math.floor(step / (self.every * self.params["steps"]) + 1e-9)

    def _step(self):
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        parts = optimizer.gradient_accumulation_steps or 1
        return keras_internals.whole(optimizer.iterations) * parts

    def _source(self):
        return self.model if self.dense is None else self.dense


def _check_folder(directory):
    """Raises for what is no path, or the path of a file."""
    checks.check_path("directory", directory)
    if pathlib.Path(directory).is_file():
        raise NotADirectoryError(
            "`directory` must be a folder, or not be there yet. Received: "
            f"directory={str(directory)!r}, which is a file. Choose another "
            "name."
        )


def _files(directory):
    """From step to file."""
    matches = [
        (_PATTERN.fullmatch(path.name), path) for path in directory.glob("*")
    ]
    return {int(match[1]): path for match, path in matches if match}
