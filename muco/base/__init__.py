"""What has nothing to do with embeddings: files that appear whole, and locks."""
