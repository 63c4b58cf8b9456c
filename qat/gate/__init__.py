"""The accuracy gate: baselines, the paired comparison, its verdict and how that is told."""
