"""The DSA engine: scheduling, paged cache, models and kernels.

Knows token ids only: no text, no HTTP. What the server may import is its face: `engine.protocol`,
`engine.config`, `engine.errors` and `engine.client`, none of which import torch.
"""
