"""How tests start programs."""

import signal


def heed_interrupts() -> None:
    """A shell that starts the tests in the background makes them, and their children, deaf to Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
