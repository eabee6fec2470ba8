"""From batches to gradient rows or layer inputs."""
