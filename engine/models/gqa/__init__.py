"""Decoders with grouped-query attention: the llama family."""
