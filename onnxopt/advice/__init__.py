"""Which way to a classifier for another task: trained anew, a new head, or fine-tuned; compared on the same folds."""
