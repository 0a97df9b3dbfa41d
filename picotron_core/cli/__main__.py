"""`python -m picotron_core.cli`, for launchers such as torchrun."""

from picotron_core.parallel import lifeline

# Before the imports that take seconds: this process must not outlive the one that started it.
lifeline.attach()

from picotron_core.cli import main  # noqa: E402

main()
