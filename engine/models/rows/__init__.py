"""What the steps over flat rows of all families share: a step's inputs, buffers of one shape, and CUDA graphs."""
