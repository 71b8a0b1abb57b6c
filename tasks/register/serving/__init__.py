"""Code that travels inside a registered model: MLflow's models from code. Each file stands alone there.

They import torch, transformers, MLflow and what it brings, nothing of ours; nothing of ours imports them.
"""
