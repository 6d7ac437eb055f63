"""A dense model becomes sparse, and the way back: plan, do, verify."""
