"""The step: from a plan to tokens, and the process around it."""
