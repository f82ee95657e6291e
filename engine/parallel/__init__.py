"""Tensor parallelism: one model over several devices, of one host or several. Only this package uses torch.distributed."""
