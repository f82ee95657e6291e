"""What the server reports about requests: logs, traces and metrics."""
