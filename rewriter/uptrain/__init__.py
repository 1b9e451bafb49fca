"""Training a rewritten model towards its original: layer outputs first, then what the model puts out."""
