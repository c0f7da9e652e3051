"""BabyAI demonstrations as memory-mapped Zarr stores."""
