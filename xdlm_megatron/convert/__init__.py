"""See docs/continue-pretraining.md. The patches of Megatron-Core come first."""

import xdlm_megatron.parallel  # noqa: F401
