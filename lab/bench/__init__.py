"""`dsa bench`: measures from a client how fast servers with OpenAI's interface are, one or several side by side."""
