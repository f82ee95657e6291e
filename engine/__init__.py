"""The DSA engine: scheduling, paged cache, models and kernels.

It knows token ids only: no text and no HTTP. The server imports only the modules of this folder, such as
`engine.protocol` and `engine.client`. None of them imports torch.
"""
