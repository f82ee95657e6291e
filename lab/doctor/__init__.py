"""`dsa doctor`: what this machine has, what of the engine works on it and how fast it is, and what is missing.

The cases that it checks kernels with are those of the tests, which import them from here.
"""
