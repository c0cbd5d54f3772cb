"""Weight files: reading them without Caffe, their sparsity, and whether they fit a network."""
