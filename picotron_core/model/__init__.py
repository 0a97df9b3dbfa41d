"""Llama, its ops handed in as an argument; it runs on one CPU without a process group."""
