"""What a checkpoint is as bytes: names, Zarr documents and chunks, records, JSON values."""
