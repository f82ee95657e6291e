"""The operations of a step in Triton, over flat rows: any mix of prompt chunks and decodes in one launch each.

A module is one operation; `rows` says what a batch is. Everything is plain Triton, so it runs on any device that Triton
compiles for, and in its interpreter on the CPU (TRITON_INTERPRET=1 before triton is first imported). No result depends on
what else is in the batch: whatever orders a sum is a function of the row alone.
"""
