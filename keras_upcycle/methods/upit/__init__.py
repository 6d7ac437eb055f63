"""Upcycling Instruction Tuning: experts from the checkpoints of one run.

UpIT (Hui et al., arXiv 2410.01610) in its four steps, a file each:

1. `checkpoints`: while a dense model is tuned, its feed-forward weights are
   kept at fixed intervals. Each such checkpoint is an expert.
2. `expansion`: where there are too few, two experts that differ have a child.
3. `buckets` and `routing_vectors`: a few samples are sorted by which expert
   finds them likeliest, and each expert's column of the router is trained on
   its own. `working_copy` is the model that does both.
4. `assembly`: checkpoints and columns become a mixture, which trains on.

`pipeline` does steps 2 to 4 in one call. The authors' code is not public;
what the paper leaves open is said to be our choice where it is made.
"""
