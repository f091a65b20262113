"""Classification heads in graphs: where they are, what goes into them, and how a new one takes their place."""
