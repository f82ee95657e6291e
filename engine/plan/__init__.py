"""Decides each step, in integers: requests, pages, the schedule, its costs. Imports no torch."""
