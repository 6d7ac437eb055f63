"""Files that appear under their name when they are whole, and not before.

What is being written lies in a folder beside its place. Whatever ends the
writing, an error, Ctrl-C or a request to end, removes the folder; a process
that was killed leaves it, and who writes to the same place next finds it.
"""

import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from types import TracebackType

from keras_upcycle import tables

# .<name>.incomplete-<process>-<random>@<machine>
_FOLDER = re.compile(
    r"\.(?P<name>.+)\.incomplete-(?P<process>\d+)-(?P<end>[^@]+)"
    r"(@(?P<machine>.+))?"
)
# Clocks of files and of processes are not the same.
_SLACK = 2.0


class Staged:
    """A place to write to, which takes the output's name when all is done.

    What is written lies in a folder `.<name>.incomplete-<process>-...` beside
    the output. On every way out of the `with` block the folder is removed, so
    that only a process that was killed leaves one behind, and what stands
    under the output's own name is always whole. What such a process left
    behind for the same output is removed first, with a warning.

    Args:
        path: The output, in a folder that exists.
        replace: Whether `keep` may take the place of a file.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "model.keras"
        >>> with Staged(path) as staged:
        ...     size = staged.place.write_bytes(b"...")
        ...     staged.keep()
        >>> path.exists()
        True
    """

    def __init__(self, path: str | os.PathLike, replace: bool = False):
        self.path = pathlib.Path(path)
        self.replace = replace

    def __enter__(self) -> "Staged":
        clean(self.path.parent, re.escape(self.path.name))
        self.folder = pathlib.Path(
            tempfile.mkdtemp(
                prefix=f".{self.path.name}.incomplete-{os.getpid()}-",
                suffix=f"@{_machine()}",
                dir=self.path.parent,
            )
        )
        self.place = self.folder / self.path.name
        return self

    def keep(self) -> None:
        """Gives what was written the output's name, in one step.

        Raises:
            FileExistsError: If somebody else has taken the name meanwhile.
        """
        if self.replace:
            self.place.replace(self.path)
            return
        if os.path.lexists(self.path):
            raise FileExistsError(
                f"{self.path} was made by somebody else meanwhile; nothing is "
                "ever overwritten. Choose another name."
            )
        self.place.rename(self.path)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def replace(
    path: str | os.PathLike, write: Callable[[pathlib.Path], None]
) -> None:
    """Writes one file, whole or not at all; one that is there is replaced.

    Args:
        path: Of the file.
        write: Called with the path to write to, of the same name.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "numbers.txt"
        >>> replace(path, lambda draft: draft.write_text("1 2"))
        >>> path.read_text()
        '1 2'
    """
    with Staged(path, replace=True) as staged:
        write(staged.place)
        staged.keep()


def clean(folder: pathlib.Path, name: str) -> None:
    """Removes what killed processes left behind, and warns of it.

    Only folders that `Staged` names so, and none of a process that still runs
    or of another machine, whose processes are not known here: of these it
    warns too.

    Args:
        folder: Where outputs are written to.
        name: Regular expression of the outputs' names.
    """
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # what is to be written will say so
        return
    for entry in entries:
        match = _FOLDER.fullmatch(entry.name)
        if not match or not re.fullmatch(name, match["name"]):
            continue
        if entry.is_symlink() or not entry.is_dir():
            continue
        machine = match["machine"]
        if machine not in (None, _machine()):
            _warn(
                f"Found {entry}, an unfinished output of process "
                f"{match['process']} on the machine {machine!r}. It was left "
                "alone. If nothing writes there any more, remove it."
            )
        elif _runs(int(match["process"]), entry):
            _warn(
                f"Found {entry}, an unfinished output of process "
                f"{match['process']}, which still runs. It was left alone. "
                "Two that write to one place hinder each other."
            )
        else:
            _remove(entry)


def _remove(entry):
    held = _size(entry)
    shutil.rmtree(entry, ignore_errors=True)
    if entry.exists():
        _warn(
            f"Found {entry}, an unfinished output of a process that was "
            "stopped. It could not be removed. Remove it yourself."
        )
    else:
        _warn(
            f"Found {entry}, an unfinished output of a process that was "
            f"stopped. It was removed: {tables.size(held)}."
        )


def _size(entry):
    total = 0
    for file in entry.rglob("*"):
        try:
            total += file.lstat().st_size
        except OSError:
            continue
    return total


def _runs(process: int, entry: pathlib.Path) -> bool:
    """Whether the process that made the folder still runs.

    Numbers are used again: a process that is younger than what stands in the
    folder did not make it. Containers all count from 1.
    """
    if os.name != "posix":  # elsewhere `kill` asks for no answer, but kills
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it belongs to somebody else
        pass
    started = _started(process)
    if started is None:
        return True
    try:
        return entry.stat().st_mtime + _SLACK >= started
    except OSError:
        return True


def _started(process: int) -> float | None:
    """When a process started, in seconds as `time.time`; `None` if unknown."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text()
        # The second field is a name in brackets, which may hold anything.
        ticks = int(text.rpartition(")")[2].split()[19])
        since_boot = ticks / os.sysconf("SC_CLK_TCK")
        booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
        return booted + since_boot
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _machine() -> str:
    return re.sub(r"[^\w.-]", "_", socket.gethostname())[:32] or "unknown"


def _warn(text):
    warnings.warn(text, stacklevel=4)
