"""`python -m lilliput.cli`: the command line without the installed script."""

from lilliput.cli.main import main

main()
