"""What several policies share: heads, adapters, and the files of a checkpoint."""
