"""Layers to text in a dialect, text to messages, and the two schemas."""
