"""The operations with torch's own kernels, for any torch device."""
