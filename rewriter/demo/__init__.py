"""The demo: the main job on real trained weights, start to finish."""
