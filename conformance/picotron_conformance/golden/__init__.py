"""What each op must compute, forward and backward, in float64, with each permitted rounding marked.

One file an op, written from the contract alone: no code is shared with any backend, nor with the
contract's own `visible`. The gradients are written out too, because that is where kernels round.
`oracles.py` states the same by plain loops and autograd; the two are tested against each other.

Each function takes the very values that the kernel got (after their rounding to 16 bits), upstream
gradients by output name, and a `Rounding`; it returns outputs and gradients by name.
"""
