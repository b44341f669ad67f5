"""Text-to-image training and sampling in JAX: pure modules, one loop, exact resume."""

__version__ = "0.1.0"
