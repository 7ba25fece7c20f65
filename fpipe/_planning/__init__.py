"""What a pipe will cost: costs of layers, balance, prediction and advice."""
