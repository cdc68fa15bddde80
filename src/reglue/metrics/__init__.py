"""Distances between sets of images, features, and the judge."""
