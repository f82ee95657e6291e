"""Training the lightning indexer: distilled from the dense attention that it replaces.

As DeepSeek-V3.2-Exp's two stages (arXiv 2512.02556, section 2.1): a warm-up in which attention stays
dense and only the indexer learns, then a sparse stage in which the forward pass already reads the
selected tokens alone. The result is an overlay (`engine.checkpoint.overlay`).
"""
