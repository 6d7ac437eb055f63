"""What a layer adds to the loss, where replicas take turns."""

from collections.abc import Callable


class LossesByReplica:
    """For a layer whose call waits for other replicas.

    `tf.distribute` runs a thread for each replica, and lets another one run
    wherever replicas add something up. All of them hold the same layers, of
    which Keras has one list of losses: what one replica added would be cleared
    by the next one, and added up by both. A mixin, before `keras.Layer`, that
    keeps a list for each. `Layer._losses`, Keras 3.15.

    Attributes:
        replica: Gives the number of the replica that runs.
    """

    replica: Callable[[], int] = staticmethod(lambda: 0)

    @property
    def _losses(self):
        by_replica = self.__dict__.setdefault("_losses_by_replica", {})
        return by_replica.setdefault(self.replica(), [])

    @_losses.setter
    def _losses(self, value):
        # Past Keras's `__setattr__`, which would watch the lists.
        self.__dict__["_losses_by_replica"] = {self.replica(): value}
