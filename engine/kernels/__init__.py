"""The arithmetic of attention: one interface, a plain definition of each operation, and fast backends."""
