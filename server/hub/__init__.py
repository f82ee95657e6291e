"""Names of models become files."""
