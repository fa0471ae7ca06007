"""Process groups and the patches of Megatron-Core. Importing this package applies the patches.

Whatever imports megatron.core imports this package too, before it builds anything.
"""

from xdlm_megatron.parallel.patches import apply_patches

apply_patches()
