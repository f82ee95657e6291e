"""`dsa recall`: how much of dense attention an indexer captures."""
