"""Who trains: one file per kind of Caffe, one contract for all (`contract.py`)."""
