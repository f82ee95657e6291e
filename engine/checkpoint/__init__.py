"""Weights: one face (`source`) over GGUF files and Hugging Face folders, and the loader that walks it.

A model asks for what it needs by Hugging Face's names (`loader`); where the bytes lie and how they are
stored is decided here. Indexer overlays (`overlay`) are laid over a base checkpoint.
"""
