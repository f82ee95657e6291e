"""What is told of requests: logs, traces, metrics."""
