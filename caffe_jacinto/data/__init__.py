"""Images on the disk become LMDBs that Caffe reads, and LMDBs are checked before a long run."""
