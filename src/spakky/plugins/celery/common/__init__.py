"""Values that the sending and the running side share."""
