"""Support for other libraries' trainers beyond ``history.attach``. Each file imports its library, if it needs to.

accelerate, diffusers' training scripts and plain loops need nothing to train: ``history.attach(optimizer, lam)`` takes
a prepared optimizer, and ``accelerator.register_for_checkpointing(history)`` keeps the history with the rest.
"""
