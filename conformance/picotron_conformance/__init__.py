"""What proves a backend: independent float64 oracles of every contract."""
