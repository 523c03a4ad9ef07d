"""Scripts that measure, each `python -m benchmarks.NAME` in this repository's root; `--help` says what it takes."""
