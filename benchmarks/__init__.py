"""What the token path costs beside its peers: `python -m benchmarks.run`, without network or other data."""
