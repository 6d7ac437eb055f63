"""Which tokens meet which experts, with which weights: routers and losses."""
