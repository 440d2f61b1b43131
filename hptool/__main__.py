"""`python -m hptool`."""

from hptool.cli import main

main()
