"""`python -m embstore`."""

from __future__ import annotations

from embstore.cli.main import main

if __name__ == "__main__":
    main()
