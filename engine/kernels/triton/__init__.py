"""Kernels in Triton: the operations of a step on flat rows, on any GPU that Triton compiles for."""
