"""From pairs on disk to batches: sources, order, views, loader."""
