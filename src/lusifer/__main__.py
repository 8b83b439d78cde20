"""``python -m lusifer``: what torchrun starts on every rank."""

from lusifer.cli import main

main()
