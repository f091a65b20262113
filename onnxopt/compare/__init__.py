"""How two models' structures and outputs are compared, and how far outputs may differ."""
