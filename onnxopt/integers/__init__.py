"""How numbers that are stored or computed as integers are written in a graph."""
