"""What a language model predicts: log-probabilities of tokens, without logits of a whole row."""
