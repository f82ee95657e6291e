"""The cost of a million tokens by position, dense and sparse: the figure of the DeepSeek-V3.2 report, remade here."""
