"""The plain definition of each operation: what every backend is tested against."""
