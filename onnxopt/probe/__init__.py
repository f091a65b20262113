"""Linear probes: linear classifiers on features, fitted in closed form or by L-BFGS, and how well they generalize."""
