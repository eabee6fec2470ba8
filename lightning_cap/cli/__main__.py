"""``python -m lightning_cap.cli`` does what ``lightning-cap`` does."""

from __future__ import annotations

from lightning_cap.cli.command import main

if __name__ == "__main__":
    main()
