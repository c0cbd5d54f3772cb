"""What a network is: layers without text, one file per network."""
