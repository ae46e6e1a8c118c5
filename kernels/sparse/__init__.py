"""Block-sparse attention over the compressed rows, and the selectors that say which blocks to compute."""
