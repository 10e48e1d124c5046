"""What compares two sets of clips: metrics, optical flow, and the plain baselines a model has to beat."""
