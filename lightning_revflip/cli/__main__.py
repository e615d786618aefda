"""`python -m lightning_revflip.cli` is `revflip`."""

from lightning_revflip.cli import main

if __name__ == "__main__":
    main()
