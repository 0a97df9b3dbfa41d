"""`picotron slurm`: runs as jobs of a cluster that Slurm schedules."""
