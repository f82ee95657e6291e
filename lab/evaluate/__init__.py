"""Compares dense and sparse attention on the same running server, request by request.

`lab.evaluate.run` runs the parts `loss`, `needles`, `agreement` and `equality`. The part `recall` needs the
model itself, so it is in `lab.recall`. Nothing in this folder imports torch.
"""
