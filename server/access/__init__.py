"""Who calls, and what the caller may: keys, limits of rate, budgets. Knows no HTTP."""
