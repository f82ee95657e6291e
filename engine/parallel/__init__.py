"""One model over several devices of one host. The only user of torch.distributed."""
