"""Files of the published code bases, in and out, and sharing of runs."""
