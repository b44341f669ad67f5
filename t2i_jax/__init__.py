"""Text-to-image training and sampling in JAX: pure modules, one loop, exact resume."""

__version__ = "0.1.0"

import os

# Read when JAX is first imported. What ends a program comes as an exception, too; what XLA logs
# beside that, pages for every program from the compile cache, is about hints its compiler took.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
