"""Things that users choose by a name: each says its own."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

Thing = TypeVar("Thing")


class Named(Mapping[str, Thing], Generic[Thing]):
    """A table of named things, in the order in which they were added.

    Args:
        argument: What takes a name.
        others: What it takes besides, for messages: `" or a `Router`"`.

    Example:
        >>> colours = Named("colour", " or an `RGB`")
        >>> _ = colours.add("red", (255, 0, 0))
        >>> colours.find("red")
        (255, 0, 0)
        >>> colours.find("blue")
        Traceback (most recent call last):
        ValueError: `colour` must be one of ['red'] or an `RGB`. Received: ...
    """

    def __init__(self, argument: str, others: str = ""):
        self.argument = argument
        self.others = others
        self.things: dict[str, Thing] = {}

    def __getitem__(self, name: str) -> Thing:
        return self.things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.things)

    def __len__(self) -> int:
        return len(self.things)

    def add(self, name: str, thing: Thing) -> Thing:
        """Makes a thing known by a name; one of that name gives way."""
        self.things[name] = thing
        return thing

    def named(self, name: str) -> Callable[[Any], Any]:
        """Decorates a class so that it is known by a name."""
        return lambda thing: self.add(name, thing)

    def find(self, name: str) -> Thing:
        """The thing of that name.

        Raises:
            ValueError: If there is none.
        """
        if name not in self.things:
            raise ValueError(f"{self._asked(name)}.")
        return self.things[name]

    def refusal(self, value: Any) -> TypeError:
        """The error for what is neither a name nor what is taken besides."""
        return TypeError(
            f"{self._asked(value)} of type {type(value).__name__}."
        )

    def _asked(self, value):
        return (
            f"`{self.argument}` must be one of {sorted(self)}{self.others}. "
            f"Received: {self.argument}={value!r}"
        )
