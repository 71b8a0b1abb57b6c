"""What surrounds any training: folders, checkpoints, tracking, seeds, devices. Knows no parameter section."""
