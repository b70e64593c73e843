"""The ablation of DVT's reuse modules at a small scale, beside the paper's table 6."""
