"""`edge.RMSNorm` and `edge.AddRMSNorm`: root-mean-square normalisation, alone or after a scaled residual add."""
