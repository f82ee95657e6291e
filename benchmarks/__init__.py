"""Programs that measure published figures and the engine's built-in constants, and write the tables of the docs."""
