"""`dsa bench curve`: the cost of a million tokens by position, dense and sparse, as in the DeepSeek-V3.2 report."""
