"""megatron_lsh: pretrain mixture-of-experts transformers when the network is the bottleneck.

The rooms of the house and the one-way order of imports are described in ``docs/architecture.md``.
"""

__version__ = "0.1.0.dev0"
