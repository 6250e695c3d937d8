"""A transformer's training step from its sizes alone: no JAX, no trace, any grid of devices."""
