"""Weight transforms: pure functions of arrays."""
