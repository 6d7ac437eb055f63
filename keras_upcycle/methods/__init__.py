"""The methods, a file a paper: what experts start from, how tokens choose."""
