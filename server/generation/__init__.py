"""A body becomes jobs, jobs become text, text becomes the objects of the wire."""
