"""`python -m picotron_core.cli`, for launchers such as torchrun."""

from picotron_core.cli import main

main()
