"""Calibration: batches out of whatever a person gives, and runs of a model that stop at its attentions."""
