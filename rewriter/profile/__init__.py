"""Profiling: time, memory and operators of a model before and after."""
