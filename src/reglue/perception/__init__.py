"""What images, features and latents show: heads, probes, labelled data."""
