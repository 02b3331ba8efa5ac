"""`python -m selfe VERB ...`, the same as the command `selfe`."""

from selfe.cli import main

main()
