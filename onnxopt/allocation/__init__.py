"""How much of each layer to remove: what it loses after repair, what it saves, and the best ratio of both."""
