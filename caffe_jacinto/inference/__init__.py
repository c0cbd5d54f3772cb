"""Trained networks put to use: images in, probabilities out."""
