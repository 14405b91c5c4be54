"""The command `ruiji`, also as `python -m pipeline`: loads the command line, and runs it."""

import signal


def main() -> None:
    """Run the command line. A Ctrl-C while it is loaded ends the process without a traceback: nothing has begun."""
    at_first = signal.getsignal(signal.SIGINT)
    # A process in the background of a script ignores Ctrl-C, and goes on doing so.
    if at_first is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from pipeline import cli

    signal.signal(signal.SIGINT, at_first)
    cli.main()


if __name__ == "__main__":
    main()
