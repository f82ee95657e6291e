"""Measurements that published numbers and built-in constants come from."""
