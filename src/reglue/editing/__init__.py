"""Editing images: what of an image is held, what is replaced, and the folder of what is drawn anew."""
