"""What KerasHub's models lack in training: mixed into our subclasses."""

import keras
from keras import tree


class ClearsGradients:
    """Mixed into a KerasHub model: a step on torch starts from no gradients.

    Keras calls torch's `zero_grad`, which knows the parameters that torch
    found as attributes. It finds few of those of a KerasHub task, and of two
    weights with the same path only one, so that gradients would add up from
    step to step. For the same reason an optimizer of torch's own, given
    `model.parameters()`, would leave the others as they are. Other backends
    call neither method.
    """

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        """All that torch found, and what else trains."""
        found = set()
        for name, parameter in super().named_parameters(
            prefix, recurse, remove_duplicate
        ):
            found.add(id(parameter))
            yield name, parameter
        start = f"{prefix}." if prefix else ""
        for number, variable in enumerate(self.trainable_variables):
            if id(variable.value) not in found:
                found.add(id(variable.value))
                # Numbered, for paths may collide.
                yield f"{start}{variable.path}.{number}", variable.value

    def zero_grad(self, set_to_none=True):
        """Forgets the gradients of all weights, as torch's method should."""
        for variable in self.variables:
            variable.value.grad = None


class TakesPyDataset(ClearsGradients):
    """Mixed into a KerasHub task: `fit` and the like take a `PyDataset`.

    KerasHub maps a task's preprocessor over arrays, `tf.data` and Grain, and
    rejects what it cannot map. Each batch of a `PyDataset` is preprocessed
    here instead, in whatever workers the data set runs; with `preprocessor`
    `None` batches pass as they are.
    """

    def fit(self, x=None, *args, validation_data=None, **kwargs):
        if isinstance(x, keras.utils.PyDataset):
            if validation_data is not None:
                validation_data = self._prepared_validation(validation_data)
            return keras.Model.fit(
                self,
                self._prepared(x),
                *args,
                validation_data=validation_data,
                **kwargs,
            )
        if isinstance(validation_data, keras.utils.PyDataset):
            raise ValueError(
                "A PyDataset as `validation_data` goes with a PyDataset as "
                f"`x`. Received: x of type {type(x).__name__}. Wrap the "
                "training data in a PyDataset too."
            )
        return super().fit(x, *args, validation_data=validation_data, **kwargs)

    def evaluate(self, x=None, *args, **kwargs):
        if isinstance(x, keras.utils.PyDataset):
            return keras.Model.evaluate(
                self, self._prepared(x), *args, **kwargs
            )
        return super().evaluate(x, *args, **kwargs)

    def predict(self, x=None, *args, **kwargs):
        if isinstance(x, keras.utils.PyDataset):
            return keras.Model.predict(self, self._prepared(x), *args, **kwargs)
        return super().predict(x, *args, **kwargs)

    def _prepared_validation(self, data):
        if isinstance(data, keras.utils.PyDataset):
            return self._prepared(data)
        if self.preprocessor is None:
            return data
        if isinstance(data, tuple):
            return tree.map_structure(_as_array, self.preprocess_samples(*data))
        return data.map(self.preprocess_samples)

    def _prepared(self, dataset):
        if self.preprocessor is None or isinstance(dataset, _Preprocessed):
            return dataset
        return _Preprocessed(dataset, self.preprocess_samples)


class _Preprocessed(keras.utils.PyDataset):
    """A `PyDataset` with a function applied to each batch."""

    def __init__(self, dataset, function):
        super().__init__(
            workers=dataset.workers,
            use_multiprocessing=False,
            max_queue_size=dataset.max_queue_size,
        )
        self.dataset = dataset
        self.function = function

    def __len__(self):
        return len(self.dataset)

    @property
    def num_batches(self):
        return self.dataset.num_batches

    def __getitem__(self, index):
        batch = self.dataset[index]
        parts = keras.utils.unpack_x_y_sample_weight(
            batch if isinstance(batch, tuple) else (batch,)
        )
        return tree.map_structure(_as_array, self.function(*parts))

    def on_epoch_begin(self):
        self.dataset.on_epoch_begin()

    def on_epoch_end(self):
        self.dataset.on_epoch_end()


def _as_array(value):
    """What a preprocessor gave, a TensorFlow tensor perhaps, as NumPy."""
    return value.numpy() if hasattr(value, "numpy") else value
