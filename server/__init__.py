"""The HTTP server and the `dsa` command. Of `engine` they import only the modules that lie in its root, never torch."""
