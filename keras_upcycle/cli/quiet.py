"""What TensorFlow says of itself when it is imported, left out."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# Its C++ code writes past Python and before any level can be set: a heading,
# and lines of information. Warnings and errors begin otherwise.
_OF_ITSELF = re.compile(
    rb"I\d{4} [\d:.]+ +\d+ \S+:\d+\] |"
    rb"WARNING: All log messages before absl::InitializeLog\(\)"
)


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Standard error of what is imported inside, without these lines.

    All others are written when it is over, whether by an error or not.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            written.seek(0)
            for line in written:
                if not _OF_ITSELF.match(line):
                    os.write(2, line)
