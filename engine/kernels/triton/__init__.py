"""Attention over flat rows in Triton: one launch an operation for any mix of prompt chunks and decodes.

A module is one operation: `scores`, `select`, `attention`; `rows` says what a batch is. Everything is plain Triton, so it
runs on any device that Triton compiles for, and in its interpreter on the CPU (TRITON_INTERPRET=1 before triton is first
imported). No result depends on what else is in the batch: whatever orders a sum is a function of the row alone.
"""
