"""Trains the lightning indexer: it is distilled from the dense attention that it replaces.

The two stages are those of DeepSeek-V3.2-Exp (arXiv 2512.02556, section 2.1). In the warm-up attention stays
dense and only the indexer learns. In the sparse stage the forward pass already reads only the selected
tokens. A third stage of our own trains an adapter. The result is an overlay (`engine.checkpoint.overlay`).
"""
