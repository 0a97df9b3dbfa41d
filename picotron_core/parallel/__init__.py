"""Several processes: finding each other, agreeing, and sharing the work."""
