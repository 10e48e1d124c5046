"""Building blocks that two models share. All take and give (B, C, T, H, W)."""
