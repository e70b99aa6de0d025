"""`python -m tta_serve` is `tta-serve`."""

from tta_serve.cli import main

main()
