"""Attention of each kind (grouped-query, latent) over a batch, and what both share: the indexer and tiles."""
