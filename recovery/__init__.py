"""Recovery of a pruned model: adapters, packed training data, the trainer and the merge."""
