"""``python -m trim_export``."""

from trim_export.cli import main

main()
