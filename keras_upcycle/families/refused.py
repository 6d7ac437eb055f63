"""Models that are known and are not converted: the reason, by name."""

from keras_upcycle.errors import UpcycleError
from keras_upcycle.families.base import Family, Findings


class RefusedFamily(Family):
    """A class of models in which no block can be converted.

    Args:
        name: The class's name.
        reason: Why, and what to do instead, as the end of a sentence.
    """

    def __init__(self, name: str, reason: str):
        self.name = name
        self.reason = reason

    def find(self, model):
        return Findings(rejected=[(model.name, self.reason)])

    def rebuild(self, model, sites, replacements):
        raise UpcycleError(
            f"{model.name!r} ({self.name}) cannot be made anew: {self.reason}."
        )

    def current_layers(self, model, sites):
        return []
