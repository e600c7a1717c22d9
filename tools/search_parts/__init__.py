"""What the search tools share: corpora, words, encoders, picture features, guarded fetching, and files on disk."""
