"""`dsa bench`: how fast endpoints of OpenAI's interface are, one or several side by side, seen from a client."""
