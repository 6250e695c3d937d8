"""Meshwright: plan, predict and run distributed JAX training."""

__version__ = "0.1.0"
