"""Complete runs, each as its differences from the defaults of params/schema.py."""
