"""What a request costs: prices, accounts, the ledger."""
