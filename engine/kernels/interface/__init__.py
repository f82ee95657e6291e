"""What a kernel backend provides: each operation as a formula with shapes."""
