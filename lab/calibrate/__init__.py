"""`dsa calibrate`: fits the cost model's coefficients to measured steps, and checks the dense equivalent by dense runs.

The cost model itself is `engine.plan.cost`.
"""
