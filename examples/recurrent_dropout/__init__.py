"""Dropout of the state of an LSTM with one mask for all timesteps, in Flax and in PyTorch."""
