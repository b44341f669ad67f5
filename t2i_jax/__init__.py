"""Text-to-image training and sampling in JAX: pure Flax modules, one training loop, exact resume."""

__version__ = "0.1.0"
