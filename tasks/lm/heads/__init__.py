"""What stands on a language model: value heads, scores, reward models; and a policy with them on disk."""
