"""What inputs a model takes: sizes of dynamic axes, values by role, and the user's own data."""
