"""The side-by-side proof: dense and sparse attention asked of the same running server, request by request.

`lab.evaluate.run` drives the parts (`loss`, `needles`, `agreement`, `equality`); the last one, `recall`,
looks inside the model and so is a program of the engine's. Nothing here imports torch.
"""
