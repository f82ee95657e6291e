"""The small parts that models are wired from."""
