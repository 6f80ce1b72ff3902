"""The rotation's cos and sin of a ragged batch, computed on the device once a step for all layers."""
