"""What has nothing to do with embeddings: files that appear whole, locks, fetching, text, tables and charts."""
