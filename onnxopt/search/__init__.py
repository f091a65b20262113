"""Looks for the fastest or smallest model within a budget."""
