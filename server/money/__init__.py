"""Money: prices, the account of each request, and the ledger of all requests."""
