"""The embedded demo: a small trained Mixture-of-Experts model and held-out text to audit it on."""

from audit.demo.text import CHECKPOINT, DOMAINS, HeldOut, held_out

__all__ = ["CHECKPOINT", "DOMAINS", "HeldOut", "held_out"]
