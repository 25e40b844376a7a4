"""`python -m orchestrator` is the `orchestrator` program."""

from orchestrator.cli.main import main

if __name__ == "__main__":
    main()
