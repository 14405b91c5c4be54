"""`python -m pipeline` is the command `ruiji`."""

from pipeline.cli import main

main()
