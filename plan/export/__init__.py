"""A plan in the words of others: plain JAX, Megatron-LM, MaxText. See docs/export.md."""
