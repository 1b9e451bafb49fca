"""Matching: anchors, score paths, operands, and the sites they make."""
