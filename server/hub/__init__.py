"""Finds the files of a model by its name, and downloads them if they are missing."""
