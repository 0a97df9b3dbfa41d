"""`picotron compare`: the same steps of a run in two or more ways, and what each takes."""
