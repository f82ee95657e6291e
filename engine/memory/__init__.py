"""How numbers lie in memory: FP8 blocks, 4 and 8 bits, cached latents and index keys, planes, arenas."""
