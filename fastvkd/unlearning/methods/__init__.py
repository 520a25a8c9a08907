"""Output-level unlearning methods, one a file: what the answers of a model shall become.

A loss maps `Answers` (what the model makes of a batch at its answer positions) to scalar terms `forget` and `retain`.
A loss that needs the frozen original remembers it beforehand, question by question (`remember`): no second model is
held. `fastvkd.methods` says which there are and what each needs.
"""
