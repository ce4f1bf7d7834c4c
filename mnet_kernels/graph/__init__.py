"""What modules compute and which neighbours run as one op: read once for the models, accelerate and fold."""
