"""Lets a training step on CPUs keep the memory that it frees.

A step of a program takes one block for all its temporaries and gives it back.
glibc returns a block of more than 32 MiB to the system at once, and one of more
than 64 MiB in a thread's own heap, so that the next step meets a fresh page
every 4 KiB. A mixture's step needs more room than the dense one it came of:
where only the sparse one crosses the line, it took twice as long, not the 1.4
times that its operations say (`python -m benchmarks.steps --model lm_64`, with
and without `KERAS_UPCYCLE_ALLOCATOR=system`).

Importing the package therefore asks glibc to keep what is freed, for the whole
process, which then holds on to its peak. Not where someone has decided already
(any `MALLOC_...` or `GLIBC_TUNABLES` in the environment), not where the work is
done on an accelerator, and not with `KERAS_UPCYCLE_ALLOCATOR=system`.
"""

import ctypes
import glob
import os
import sys
from collections.abc import Mapping

VARIABLE = "KERAS_UPCYCLE_ALLOCATOR"
# Options of <malloc.h> and what they are set to: one arena, so that no block
# lies in a thread's heap; no block mapped by itself; never trimmed; 100 MB more
# than is asked for.
KEPT = ((-8, 1), (-4, 0), (-1, -1), (-2, 100_000_000))
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/kfd", "/dev/vfio/*")
_state = {"kept": False}


def keep(requested: bool | None = None) -> bool:
    """Asks the allocator for it where that is requested; see the module.

    Args:
        requested: `None` asks `is_requested`.

    Returns:
        Whether freed memory is kept now.

    Raises:
        ValueError: If the environment's `KERAS_UPCYCLE_ALLOCATOR` is neither
            `"keep"` nor `"system"`.
    """
    if requested is None:
        requested = is_requested(os.environ)
    if requested and not _state["kept"]:
        _state["kept"] = set_options(KEPT)
    return _state["kept"]


def is_kept() -> bool:
    """Whether freed memory is kept in this process."""
    return _state["kept"]


def is_requested(environment: Mapping[str, str]) -> bool:
    """Whether `keep` is to do anything.

    Args:
        environment: `os.environ`, or one like it.
    """
    chosen = environment.get(VARIABLE)
    if chosen not in (None, "keep", "system"):
        raise ValueError(
            f'The environment\'s `{VARIABLE}` must be "keep" or "system". '
            f"Received: {chosen!r}. Unset it for the default."
        )
    if chosen is not None:
        return chosen == "keep"
    decided = any(
        name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"
        for name in environment
    )
    return not decided and not any(glob.glob(path) for path in _ACCELERATORS)


def set_options(options: tuple[tuple[int, int], ...]) -> bool:
    """Sets options of glibc's allocator.

    Args:
        options: Pairs of an option of <malloc.h> and its value.

    Returns:
        Whether there is such an allocator and it took them all.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False  # musl has a `mallopt` that does nothing
    return all([library.mallopt(name, value) for name, value in options])
