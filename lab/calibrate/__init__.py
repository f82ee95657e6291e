"""Fits the cost model's coefficients to measured steps, and proves the dense equivalent by dense runs."""
