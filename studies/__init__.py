"""Studies: does upcycling pay, and what does each choice do?"""

import pathlib
import sys

# Reading data and corrupting spans is the examples' own; they are scripts,
# which import their neighbours.
sys.path.append(str(pathlib.Path(__file__).parent.parent / "examples"))
