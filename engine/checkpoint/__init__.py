"""Reads weights: one interface (`source`) for GGUF files and Hugging Face folders, and the loader that uses it.

A model asks for its weights by Hugging Face's names (`loader`). This package knows where the bytes lie and how they are
stored. Indexer overlays (`overlay`) are laid over a base checkpoint.
"""
