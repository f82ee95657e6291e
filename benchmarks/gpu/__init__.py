"""What the GPU path takes on one GPU."""
