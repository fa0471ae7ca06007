"""What a recipe costs on a cluster, before it is started. No torch."""
