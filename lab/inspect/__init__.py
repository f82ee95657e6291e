"""`dsa inspect`: says what a model is and what it needs, from its config and the headers of its files."""
