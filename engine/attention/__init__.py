"""Attention of each kind, and the sparse machinery they share: indexer, selection, tiles."""
