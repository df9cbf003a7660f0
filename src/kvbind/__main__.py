"""`python -m kvbind`."""

from kvbind.cli import main

if __name__ == "__main__":
    main()
