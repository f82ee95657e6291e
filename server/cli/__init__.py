"""The `dsa` command. Each of its commands has a module."""
