"""The step as integers: requests, pages, the schedule and its costs. Imports no torch."""
