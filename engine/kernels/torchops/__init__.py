"""The operations with torch's own kernels: they run on any torch device."""
