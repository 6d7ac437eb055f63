"""`python -m keras_upcycle` is `keras-upcycle`."""

import sys

from keras_upcycle.cli import main

if __name__ == "__main__":
    sys.exit(main())
