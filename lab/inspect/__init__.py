"""`dsa inspect`: what a model is and needs, worked out from its config and its files' headers."""
