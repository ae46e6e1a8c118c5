"""Graph passes: FX graph in, FX graph out."""
