"""`dsa recall`: measures how much of dense attention an indexer captures. `dsa eval` runs it as one of its parts."""
