"""`python -m edge` is the command `edge`."""

from edge.cli import main

main()
