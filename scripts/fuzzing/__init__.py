"""Cases of `scripts/fuzz.py`: how one is run and judged, and the changes that are drawn."""
