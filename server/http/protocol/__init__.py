"""The wire: request bodies, response objects, errors and server-sent events, as OpenAI spells them.

What a body means for a particular model (vocabulary, context, sparsity) is `server.generation.intake`'s.
"""
