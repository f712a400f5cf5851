"""`python -m bitwright`."""

from bitwright.cli.app import main

main()
