"""``python -m lightning_multinorm``: see `lightning_multinorm.cli`."""

from lightning_multinorm.cli import main

main()
