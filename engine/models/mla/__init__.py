"""Decoders with multi-head latent attention and experts: the DeepSeek-V3 family."""
