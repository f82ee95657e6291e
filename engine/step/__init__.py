"""Computes steps: from a plan of the scheduler to tokens. Contains the engine process and its workers."""
