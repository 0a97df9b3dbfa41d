"""In which order a pipeline stage computes: one file a schedule, each a pure function."""
