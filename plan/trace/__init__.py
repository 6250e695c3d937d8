"""JAX loss function -> layers of operators, on abstract values only. The one part of planning that imports JAX."""
