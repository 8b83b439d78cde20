"""``python -m lusifer``: what torchrun starts on every rank."""

from lusifer.cli.app import main

main()
