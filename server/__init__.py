"""The HTTP server. Of `engine` it imports the face only, and never torch."""
