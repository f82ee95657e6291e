"""The small parts that models consist of: products, norms, rotation, experts."""
