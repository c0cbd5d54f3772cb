"""Caffe's log lines, as events, as a stage's figures, as tables and plots."""
