"""What recipes share to fit themselves honestly; nothing in here is a probe, and no other part of the engine needs it.

==============================  ======================================================================================
:mod:`.folds`                   folds that keep an item's rows together, class-balanced weights to learn and judge by
:mod:`.scaling`                 units in which features, or the scores of members, can be compared
:mod:`.descent`                 many trials in one compiled descent, judged on rows that they did not learn from
:mod:`.pooling`                 tokens: what a mask means, and a maximum that can be learned
:mod:`.pairs`                   contrast pairs: normalized halves, the sign of a direction, Platt scaling
:mod:`.density`                 negatives alone: a shrunk covariance, its leading axes
:mod:`.held_out`                choosing among whole probes: held-out AUROC, bits kept
==============================  ======================================================================================

Fits that see one batch at a time are in :mod:`elk_stress.probing.fit.streaming`.
"""
