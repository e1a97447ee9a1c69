"""What is in the data, and making it better: inspect, deduplicate, pack into fast shards."""
