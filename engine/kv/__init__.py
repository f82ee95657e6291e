"""The paged cache: which page belongs to whom (`pages`), and which content is worth keeping (`prefix`)."""
