"""`python -m mmm_export` is the same program as `mmm-export`."""

from mmm_export.cli import main

main()
