"""The wire format, which is OpenAI's: request bodies, response objects, errors and server-sent events.

`server.generation.intake` decides what a body means for a particular model (vocabulary, context, sparsity).
"""
