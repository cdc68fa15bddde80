"""Image folders, the store, batches."""
