"""What every training on stored rows shares: transformers' Trainer over packed batches, without pickles."""
